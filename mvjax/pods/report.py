"""Estimates as text: what `mvjax estimate` prints, and the lines of the tables in the docs."""

from typing import Any

from mvjax.experiment import Experiment
from mvjax.parallel import GB
from mvjax.pods.compile import Estimate
from mvjax.pods.cost import Range

# Names of `mvjax.pods.cost.PARTS` but for the exchanges.
PART_NAMES = {
    "attention_kernels": "attention kernels",
    "other_kernels": "other kernels",
    "products": "matrix products",
    "memory_bound": "memory-bound",
    "copies": "copies",
    "reductions": "reductions",
}


def report(experiment: Experiment, topology: str, found: Estimate) -> str:
    """Several lines: what was compiled, whether it fits, what it exchanges, how long it takes."""
    per_chip = found.batch_size / found.devices
    slices = f"{found.slices} x " if found.slices > 1 else ""
    share = found.peak_bytes / found.hbm_bytes
    fits = "fits" if share <= 1 else "DOES NOT FIT"
    frozen = f", {millions(found.frozen)} frozen in the backbone" if found.frozen else ""
    host = f", {as_bytes(found.host_bytes)} in the host" if found.host_bytes else ""
    lora = experiment.video.lora
    training = f"LoRA of rank {lora.rank}" if lora else "full training"
    learns = [f"video, {training}, remat {found.kept}"] * experiment.learns_video
    learns += ["action decoder"] * experiment.learns_actions
    what = ", and ".join(learns)
    rows = [
        ("step", f"{what}, {experiment.tokens:,} tokens per clip"),
        ("pod", f"{slices}{topology}, {found.devices} x {found.device}"),
        ("mesh", " ".join(f"{axis}={size}" for axis, size in found.mesh.items())),
        ("batch", f"{found.batch_size} clips, {per_chip:g} per chip"),
        (
            "parameters",
            f"{millions(found.parameters)}, {millions(found.trainable)} learn{frozen}",
        ),
        (
            "memory",
            f"arguments {as_bytes(found.argument_bytes)}, peak {as_bytes(found.peak_bytes)} of "
            f"{as_bytes(found.hbm_bytes)} per chip ({share:.0%}): {fits}{host}",
        ),
        *_times(found),
        *zip(["exchange", *[""] * len(found.collectives)], _exchanges(found)),
        ("compiled", f"in {found.compile_seconds:.0f} s"),
    ]
    return as_lines(rows)


def as_lines(rows: list[tuple[str, str]]) -> str:
    """Rows of a name and a text, one below the other."""
    return "\n".join(f"{name:<12}{text}" for name, text in rows)


def _times(found: Estimate) -> list[tuple[str, str]]:
    seconds, mfu = found.step_seconds, found.mfu
    exposed = found.parts["exposed_exchanges"]
    hidden = found.link_seconds - exposed.low
    hidden = hidden if hidden > seconds.low / 1000 else 0.0
    spent = {name: found.parts[key].middle for key, name in PART_NAMES.items()}
    where = [f"{name} {seconds:.3g} s" for name, seconds in spent.items() if seconds]
    worst = found.worst_products[:1]
    return [
        (
            "step time",
            f"{between(seconds)} s by the compiled program, {mfu.middle:.1%} MFU "
            f"({mfu.low:.1%} to {mfu.high:.1%}), {found.flops / 1e12:.4g} TFLOP per chip "
            f"at {found.peak_flops / 1e12:g} TFLOP/s, {found.clips_per_second:.3g} clips/s in "
            "the pod",
        ),
        (
            "where",
            f"{', '.join(where)}, exchanges {exposed.middle:.3g} s exposed, {hidden:.3g} s hidden; "
            f"in all {seconds.middle:.3g} s, the middle",
        ),
        (
            "products",
            f"run at {found.products_peak_share:.0%} of the peak"
            + "".join(
                f"; worst: {p.peak_share:.1%} in {p.source}, window {p.window or 'not known'}, "
                f"{p.runs} x {1e3 * p.seconds / p.runs:.3g} ms"
                for p in worst
            ),
        ),
        *(("note", note) for note in found.notes),
    ]


def between(seconds: Range, per_second: float = 1.0) -> str:
    """The bounds of a time with three figures, "2.65 to 3.24"; 1e3 per second: milliseconds."""
    return f"{seconds.low * per_second:.3g} to {seconds.high * per_second:.3g}"


def _exchanges(found: Estimate) -> list[str]:
    if not found.collectives:
        return ["none"]
    lines = []
    for exchange in found.collectives:
        where = " between slices" if exchange.across_slices else ""
        size = as_bytes(exchange.sent_bytes)
        lines.append(f"{exchange.count:>6} x {exchange.kind}{where}, {size}")
    floor = f"sent per chip and step; {found.link_seconds:.3g} s if all links are busy"
    return [*lines, floor]


def millions(count: int) -> str:
    """A number of parameters."""
    return f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:,.2f} G"


def as_bytes(count: float) -> str:
    """A size, in GB or MB of 1024."""
    return f"{count / GB:.2f} GB" if count >= GB / 100 else f"{count / 2**20:.2f} MB"


def table(estimates: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of estimates.

    Args:
        estimates: Arguments of `launch.estimate` -> what it wrote with --json; one line for each.
    """
    if not estimates:
        return ""
    head = (
        "| pod | chips | mesh d·f·c·t | clips | peak GB | arguments GB | TFLOP | sent GB | s | "
        "MFU | clips/s | `mvjax estimate ...` |\n|---|" + "---:|" * 10 + "---|\n"
    )
    return head + "".join(f"| {' | '.join(_cells(*line))} |\n" for line in estimates.items())


def _cells(arguments: str, p: dict[str, Any]) -> list[str]:
    across = sum(c["sent_bytes"] for c in p["collectives"] if c["across_slices"]) / GB
    host = f" + {p['host_bytes'] / GB:.1f} in the host" if p["host_bytes"] else ""
    inside = sum(c["sent_bytes"] for c in p["collectives"] if not c["across_slices"]) / GB
    return [
        f"{p['slices']} x {p['topology']}" if p["slices"] > 1 else p["topology"],
        f"{p['devices']}",
        "·".join(str(size) for size in p["mesh"].values()),
        f"{p['batch_size']}",
        f"{p['peak_bytes'] / GB:.1f} of {p['hbm_bytes'] / GB:.1f}{host}",
        f"{p['argument_bytes'] / GB:.2f}",
        f"{p['flops'] / 1e12:.0f}",
        f"{inside:.1f}" + (f" + {across:.2f}" if across else ""),
        f"{p['step_seconds']['low']:.2f} to {p['step_seconds']['high']:.2f}",
        f"{p['mfu']['middle']:.0%}",
        f"{p['clips_per_second']:.3g}",
        f"`{arguments}`",
    ]
