"""The sections of the report, each an HTML string; what is missing is said in a line."""

from collections.abc import Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from mvjax.evaluation import figures
from mvjax.evaluation.report_data import Curve, Evaluated
from mvjax.evaluation.report_html import (
    bar,
    count,
    duration,
    interval,
    memory,
    missing,
    percent,
    rate_cell,
    row,
    section,
    table,
    video,
)
from mvjax.evaluation.statistics import SuccessRate

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
