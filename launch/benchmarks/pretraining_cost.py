"""Makes the table of docs/pretraining.md: the cost of one pass over so many hours of video.

    python -m launch.benchmarks.pretraining_cost --price=2.0

It reads the estimates of docs/estimates (`launch.benchmarks.pod_tables`) and compiles nothing.
"""

import json
from typing import Any

from absl import flags

from configs import bridge_video
from launch.benchmarks.pod_tables import DOCS, file_of
from launch.entry import run
from mvjax.experiment import Experiment

BEGIN, END = (f"<!-- {word}: launch.benchmarks.pretraining_cost -->\n" for word in ("begin", "end"))
PRICE = 2.0  # of the page's table
PRICES = flags.DEFINE_float("price", PRICE, "Dollars per chip and hour.", lower_bound=0.0)

HOURS = (1_000, 10_000, 100_000, 1_000_000)
# What is trained, and the estimate whose step it takes; all parameters learn.
RUNS = {
    "2B": ("full_v6e_256", "full_v5p_512", "full_v5p_4096"),
    "14B": ("14b_v5p_32", "14b_v5p_4096"),
}


def main() -> None:
    """Rewrites the table."""
    page = DOCS / "pretraining.md"
    page.write_text(with_table(page.read_text(), PRICES.value))


def clips_per_hour(experiment: Experiment) -> float:
    """Clips that lie one after the other in an hour of video."""
    return 3600 * experiment.clip.fps / experiment.clip.frames


def with_table(page: str, price: float = PRICE) -> str:
    """The page with the table made from the files."""
    experiment = Experiment.from_config(bridge_video.get_config())
    head = (
        "| hours of video | clips | tokens | network | pod | chips | chip-hours | time | "
        f"cost at ${price:g} a chip-hour |\n|---:|---:|---:|---|---|---:|---:|---:|---:|\n"
    )
    per_hour, tokens = clips_per_hour(experiment), experiment.clip.tokens
    rows = [
        _row(hours, hours * per_hour, tokens, network, _figures(name), price)
        for hours in HOURS
        for network, names in RUNS.items()
        for name in names
    ]
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}{head}{''.join(rows)}{END}{rest.split(END)[1]}"


def _figures(name: str) -> dict[str, Any]:
    return json.loads(file_of(name).read_text())


def _row(
    hours: int, clips: float, tokens: int, network: str, made: dict[str, Any], price: float
) -> str:
    chips = made["devices"]
    seconds = [made["step_seconds"][end] for end in ("low", "high")]
    chip_hours = [clips / made["batch_size"] * chips * s / 3600 for s in seconds]
    cells = [
        f"{hours:,}",
        _short(clips),
        _short(clips * tokens),
        network,
        f"{made['slices']} x {made['topology']}" if made["slices"] > 1 else made["topology"],
        f"{chips:,}",
        _range(chip_hours),
        _time([h / chips for h in chip_hours]),
        _range([h * price for h in chip_hours], "$"),
    ]
    return f"| {' | '.join(cells)} |\n"


def _range(ends: list[float], unit: str = "") -> str:
    return " to ".join(f"{unit}{_short(end)}" for end in ends)


def _time(hours: list[float]) -> str:
    days = hours[-1] >= 48
    return f"{_range([h / 24 for h in hours] if days else hours)} {'days' if days else 'h'}"


def _short(number: float) -> str:
    """Two significant digits, with the usual names of thousands."""
    for size, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{_digits(number / size)}{name}"
    return _digits(number)


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


if __name__ == "__main__":
    run(main)
