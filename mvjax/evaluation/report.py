"""One self-contained HTML file about a run: results, videos, losses, time, how to repeat it.

It needs no network, no JavaScript and no other file. It can be drawn at any time; what a run has
not produced yet is said in a line. All it reads lies in the run folder:

- `evaluation/<setting>/results.jsonl`, `setting.json`, `videos/*.mp4`: see
  `mvjax.evaluation.rollout`, which writes them;
- `<stage>/metrics.jsonl` of the stages `video` and `action`: one JSON object per
  logged step with "step" and any number of names ending in "loss" (the curves drawn);
- `predictions/<name>_predicted.mp4` and `<name>_true.mp4`: pairs of videos (H.264);
- `phases.json`: [{"name": "train video", "seconds": 75.2, "peak_mb": 1450}, ...] in the order they
  ran, peak_mb optional;
- `study/results.json`: [{"label": "trained on video", "demonstrations": 10, "successes": 103,
  "trials": 120}, ...], optional;
- `command.txt`: the exact command that repeats the run;
- `environment.json`: see `mvjax.evaluation.report`, which writes it.
"""

import base64
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from mvjax.evaluation import figures
from mvjax.evaluation.closed_loop import SuccessRate, mean_success, success_rate, success_table
from mvjax.evaluation.rollout import EpisodeResult, Setting, read_results, read_setting

# Reading a run folder for the report; the files are described in `mvjax.evaluation.report`.


Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Evaluated:
    """A setting with its episodes; `tasks` and `mean` summarise them."""

    folder: Path
    setting: Setting
    results: list[EpisodeResult]
    tasks: list[SuccessRate]
    mean: SuccessRate

    @property
    def plan_ms(self) -> float | None:
        """Planning time per query in milliseconds; None without queries."""
        queries = sum(result.queries for result in self.results)
        return 1e3 * sum(r.plan_seconds for r in self.results) / queries if queries else None


def read_evaluations(folder: Path) -> list[Evaluated]:
    """Every setting in a folder of results with at least one finished episode.

    Policies by stop step, then the others.
    """
    evaluations = []
    for path in sorted(folder.glob("*/results.jsonl")):
        results = read_results(path)
        if results and (path.parent / "setting.json").exists():
            # Episodes end in any order: sorted, so that a resumed run draws the same report.
            results.sort(key=lambda result: (result.task, result.seed))
            tasks = success_table((result.task, result.success) for result in results)
            setting = read_setting(path.parent)
            evaluations.append(Evaluated(path.parent, setting, results, tasks, mean_success(tasks)))
    order = ["policy", "oracle", "expert", "none"]
    return sorted(
        evaluations, key=lambda e: (order.index(e.setting.mode), e.setting.stop_step or 0)
    )


def main_evaluation(evaluations: list[Evaluated]) -> Evaluated | None:
    """The setting marked main, or the policy with the fewest video steps (the paper's default).

    A variant only where there is nothing else.
    """
    marked = [evaluated for evaluated in evaluations if evaluated.setting.main]
    policies = [e for e in evaluations if e.setting.mode == "policy"]
    own = [e for e in policies if not e.setting.variant]
    return next(iter(marked + own + policies), None)


def read_losses(metrics: Path) -> dict[str, Curve]:
    """Every logged number whose name ends in "loss": name -> (steps, values), finite ones only."""
    points: dict[str, dict[int, float]] = {}
    for row in _json_lines(metrics):
        for name, value in row.items():
            if name.endswith("loss") and isinstance(value, int | float) and np.isfinite(value):
                points.setdefault(name, {})[row["step"]] = value  # a resumed step counts once
    return {name: _curve(values) for name, values in points.items()}


def read_phases(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of `phases.json`."""
    return _json_or(run_dir / "phases.json", [])


def read_environment(run_dir: Path) -> dict[str, Any]:
    """The content of `environment.json`, or nothing."""
    return _json_or(run_dir / "environment.json", {})


def read_study(run_dir: Path) -> dict[str, list[tuple[int, SuccessRate]]]:
    """The sample-efficiency study: label -> (demonstrations, success) pairs."""
    curves: dict[str, list[tuple[int, SuccessRate]]] = {}
    for row in _json_or(run_dir / "study" / "results.json", []):
        rate = success_rate(row["label"], row["successes"], row["trials"])
        curves.setdefault(row["label"], []).append((row["demonstrations"], rate))
    return curves


def read_predictions(run_dir: Path) -> dict[str, tuple[Path, Path]]:
    """Name -> (predicted, true) video files, where both are there."""
    pairs = {}
    for predicted in sorted(run_dir.glob("predictions/*_predicted.mp4")):
        name = predicted.name.removesuffix("_predicted.mp4")
        true = predicted.with_name(f"{name}_true.mp4")
        if true.exists():
            pairs[name] = predicted, true
    return pairs


def _curve(values: dict[int, float]) -> Curve:
    steps = sorted(values)
    return np.array(steps), np.array([values[step] for step in steps])


def _json_or(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else otherwise


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; a last one that is still being written is left out."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


# The building blocks of the report's page, as HTML strings.


def section(title: str, body: str) -> str:
    """A titled box."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def missing(text: str) -> str:
    """The line that stands where something is not there yet."""
    return f'<p class="missing">{escape(text)}</p>'


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls sideways where the screen is narrow; `head` is plain text."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def row(name: str, cells: Sequence[str], kind: str = "") -> str:
    """A table row; `name` is plain text, `cells` are HTML."""
    drawn = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{drawn}</tr>'


def rate_cell(rate: SuccessRate | None) -> str:
    """A success rate with its bar, episodes and interval."""
    if rate is None:
        return "–"
    below = f"<small>{rate.successes}/{rate.trials} · {interval(rate)}</small>"
    return bar(rate.rate, percent(rate.rate)) + below


def bar(fraction: float, text: str) -> str:
    """Text over a bar that is filled to `fraction`."""
    return f'{escape(text)}<span class="bar"><i style="width:{100 * fraction:.1f}%"></i></span>'


def video(path: Path) -> str:
    """A silent looping video, embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<video autoplay loop muted playsinline src="data:video/mp4;base64,{data}"></video>'


def percent(fraction: float) -> str:
    """A fraction as a percentage with one decimal where it is not whole."""
    return f"{100 * fraction:.1f}".removesuffix(".0") + " %"


def interval(rate: SuccessRate) -> str:
    """The Wilson interval in whole percent."""
    return f"{100 * rate.low:.0f}–{100 * rate.high:.0f} %"


def count(number: int, noun: str) -> str:
    """A number of things in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def memory(megabytes: float | None) -> str:
    """Memory in gigabytes from one gigabyte on."""
    if megabytes is None:
        return "–"
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1024:.1f} GB"


# The sections of the report, each an HTML string; what is missing is said in a line.


ROLLOUTS_PER_TASK = 3


def headline(main: Evaluated | None, evaluations: list[Evaluated], seconds: float) -> str:
    """The result in one line, and the numbers to hold it against."""
    if main is None:
        return "<header><h1>Not evaluated yet</h1><p>No policy has been rolled out.</p></header>"
    mean, cards = main.mean, []
    for other in evaluations:
        if other.setting.mode in ("oracle", "expert", "none"):
            cards.append((percent(other.mean.rate), other.setting.label))
    if main.plan_ms is not None:
        cards.append((f"{main.plan_ms:.0f} ms", "planning per query"))
    if seconds:
        cards.append((duration(seconds), "all phases together"))
    drawn = "".join(f'<div class="card"><b>{v}</b><span>{escape(t)}</span></div>' for v, t in cards)
    return (
        f"<header><h1>{percent(mean.rate)} success on {count(len(main.tasks), 'task')}</h1>"
        f"<p>{escape(main.setting.label)}: {mean.successes} of {count(mean.trials, 'episode')}, "
        f"95 % interval {interval(mean)}</p>"
        f'<div class="cards">{drawn}</div></header>'
    )


def rollouts(main: Evaluated | None) -> str:
    """A grid of recorded episodes, the first few of every task."""
    shown: dict[str, list[str]] = {}
    for result in main.results if main else []:
        path = main.folder / result.video if result.video else None
        if path is None or not path.exists():
            continue
        word = "success" if result.success else "failure"
        shown.setdefault(result.task, []).append(
            f'<figure class="{word}">{video(path)}<figcaption><b>{word}</b> after '
            f"{result.steps} steps<br>{escape(result.task)}, seed {result.seed}</figcaption>"
            "</figure>"
        )
    if not shown:
        return section("Rollouts", missing("No episode was recorded."))
    grid = "".join(figure for drawn in shown.values() for figure in drawn[:ROLLOUTS_PER_TASK])
    note = (
        f"The first recorded episodes of every task, at most {ROLLOUTS_PER_TASK}, in the order "
        "of their seeds, whatever the outcome."
    )
    return section("Rollouts", f"<p>{note}</p>" + f'<div class="grid">{grid}</div>')


def success(main: Evaluated | None, evaluations: list[Evaluated]) -> str:
    """Success per task: the policy, the expert, and doing nothing."""
    columns = [main] if main else []
    columns += [e for e in evaluations if e.setting.mode in ("expert", "none") and e is not main]
    if not columns:
        return section("Success per task", missing("Nothing has been evaluated yet."))
    tasks = list(dict.fromkeys(row.name for column in columns for row in column.tasks))
    rows = []
    for task in tasks:
        cells = [next((r for r in column.tasks if r.name == task), None) for column in columns]
        rows.append(row(task, [rate_cell(cell) for cell in cells]))
    total = [rate_cell(column.mean) for column in columns]
    rows.append(row("Mean over tasks", total, "total"))
    note = "<p>Below each rate: episodes, and the 95 % Wilson interval.</p>"
    head = ["Task", *(column.setting.label for column in columns)]
    return section("Success per task", note + table(head, rows))


def sweep(evaluations: list[Evaluated]) -> str:
    """How much video denoising the policy needs: a curve of every variant with several stops."""
    title = "How far to denoise the video"
    curves: dict[str, list[tuple[int, SuccessRate]]] = {}
    for e in evaluations:
        if e.setting.mode == "policy" and e.setting.stop_step is not None:
            name = e.setting.variant or "policy"
            curves.setdefault(name, []).append((e.setting.stop_step, e.mean))
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return section(title, missing("Fewer than two stopping points have been evaluated."))
    others = [e for e in evaluations if e.setting.mode != "policy" and not e.setting.variant]
    lines = [replace(e.mean, name=e.setting.label) for e in others]
    note = (
        "<p>The decoder reads the video model after so many denoising steps of the future; "
        "with none, the future is pure noise. Bars are 95 % Wilson intervals.</p>"
    )
    return section(title, note + figures.sweep_figure(curves, lines, title))


def settings(evaluations: list[Evaluated]) -> str:
    """Every setting in a line, variants (other checkpoints, layers, shares of data) included."""
    if not evaluations:
        return section("All settings", missing("Nothing has been evaluated yet."))
    rows = []
    for e in sorted(evaluations, key=lambda e: e.setting.variant):  # stable: by mode and stop step
        stop = "–" if e.setting.stop_step is None else str(e.setting.stop_step)
        plan = "–" if e.plan_ms is None else f"{e.plan_ms:.0f} ms"
        rows.append(row(e.setting.label, [stop, rate_cell(e.mean), plan]))
    head = ["Setting", "Video steps", "Success", "Planning per query"]
    return section("All settings", table(head, rows))


def predictions(pairs: Mapping[str, tuple[Path, Path]]) -> str:
    """Predicted against true video, side by side."""
    title = "Predicted and true video"
    if not pairs:
        return section(title, missing("No video was predicted."))
    drawn = []
    for name, (predicted, true) in pairs.items():
        sides = "".join(
            f"<figure>{video(path)}<figcaption>{side}</figcaption></figure>"
            for side, path in (("predicted", predicted), ("true", true))
        )
        drawn.append(f'<figure><h3>{escape(name)}</h3><div class="pair">{sides}</div></figure>')
    note = "<p>From the same observed frames: what the video model expects, and what happened.</p>"
    return section(title, note + f'<div class="pairs">{"".join(drawn)}</div>')


def losses(stages: Mapping[str, Mapping[str, Curve]]) -> str:
    """One figure per training stage."""
    drawn = [
        f"<figure><h3>{escape(stage)}</h3>{figures.loss_figure(curves, f'{stage}: loss')}</figure>"
        for stage, curves in stages.items()
        if curves
    ]
    absent = [stage for stage, curves in stages.items() if not curves]
    lines = missing(f"Nothing logged yet: {', '.join(absent)}.") if absent else ""
    return section("Training", f'<div class="figures">{"".join(drawn)}</div>{lines}')


def study(curves: Mapping[str, list[tuple[int, SuccessRate]]]) -> str:
    """Sample efficiency; left out entirely where no such study was run."""
    if not curves:
        return ""
    title = "Sample efficiency"
    rows = [
        row(label, [str(demonstrations), rate_cell(rate)])
        for label, points in curves.items()
        for demonstrations, rate in sorted(points, key=lambda point: point[0])
    ]
    listed = table(["Training", "Demonstrations per task", "Success"], rows)
    figure = figures.study_figure(curves, title)
    return section(title, f'<div class="figures">{figure}{listed}</div>')


def phases(measured: list[dict[str, Any]]) -> str:
    """Time and peak memory of every phase."""
    title = "Time and memory"
    if not measured:
        return section(title, missing("No phase has been measured."))
    longest = max(phase["seconds"] for phase in measured) or 1
    rows = [
        row(
            phase["name"],
            [
                bar(phase["seconds"] / longest, duration(phase["seconds"])),
                memory(phase.get("peak_mb")),
            ],
        )
        for phase in measured
    ]
    total = duration(sum(phase["seconds"] for phase in measured))
    rows.append(row("All", [total, ""], "total"))
    return section(title, table(["Phase", "Time", "Peak memory"], rows))


def reproduce(command: str, environment: dict[str, Any]) -> str:
    """The command, the versions and the machine."""
    body = f"<pre>{escape(command)}</pre>" if command else missing("The command was not recorded.")
    if environment:
        versions = {"python": environment["python"], **environment["packages"]}
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        machine = (
            f"{environment['cpu']}, {count(environment['cores'], 'core')}, "
            f"{environment['memory_mb'] / 1024:.0f} GB memory, {environment['system']}"
        )
        body += f"<h3>Software</h3>{escape(listed)}<h3>Machine</h3>{escape(machine)}"
    else:
        body += missing("Software versions and the machine were not recorded.")
    return section("Reproduce", body)


STAGES = {
    "Stage 1: video model": "video",
    "Stage 2: action decoder": "action",
}


def build_report(run_dir: Path, out: Path) -> None:
    """Draws the report of a run folder.

    Args:
        run_dir: the run folder, with any of the files above.
        out: the HTML file to write; it appears complete or not at all.

    Raises:
        FileNotFoundError: there is no such run folder.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"There is no run folder {run_dir}: give the folder of a run.")
    evaluations = read_evaluations(run_dir / "evaluation")
    main = main_evaluation(evaluations)
    phases = read_phases(run_dir)
    command = run_dir / "command.txt"
    losses = {
        title: read_losses(run_dir / folder / "metrics.jsonl") for title, folder in STAGES.items()
    }
    body = [
        headline(main, evaluations, sum(phase["seconds"] for phase in phases)),
        rollouts(main),
        success(main, evaluations),
        sweep(evaluations),
        settings(evaluations),
        predictions(read_predictions(run_dir)),
        losses(losses),
        study(read_study(run_dir)),
        phases(phases),
        reproduce(
            command.read_text().strip() if command.exists() else "", read_environment(run_dir)
        ),
    ]
    _write(out, f"Run {run_dir.resolve().name}", body)


def build_evaluation_report(folder: Path) -> Path:
    """Draws `report.html` of the settings in a folder of results, and returns its path.

    Args:
        folder: with `<setting>/results.jsonl` and the rest, as `python -m launch.evaluate` leaves.
    """
    evaluations = read_evaluations(folder)
    main = main_evaluation(evaluations)
    body = [
        headline(main, evaluations, 0.0),
        rollouts(main),
        success(main, evaluations),
        sweep(evaluations),
        settings(evaluations),
    ]
    return _write(folder / "report.html", f"Evaluation in {folder}", body)


def _write(out: Path, title: str, body: list[str]) -> Path:
    template = Template(Path(__file__).with_name("report.html").read_text())
    page = template.substitute(title=escape(title), body="\n".join(body))
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page)
    return partial.replace(out)


# What a run ran on, kept with its results: `environment.json` in the run folder.


PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "mujoco",
    "metaworld",
    "av",
)


def write_environment(run_dir: Path) -> None:
    """Writes `environment.json`: Python, package versions, and the machine."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "environment.json").write_text(json.dumps(describe_environment(), indent=1) + "\n")


def describe_environment() -> dict[str, Any]:
    """Python and package versions, system, CPU name, cores this process may use, memory in MB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "python": platform.python_version(),
        "packages": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "system": platform.platform(terse=True),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_mb": memory // 2**20,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
