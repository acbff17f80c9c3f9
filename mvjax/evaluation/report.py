"""The report of a run: one self-contained HTML file with results, videos, losses and times.

It needs no network and no other file. A short script plays the videos that are in view; where
scripts are blocked, the reader starts them. The report can be built at any time: a part that the
run has not produced yet is replaced by a line that says so. The template is
`templates/report.html`; the data come from the run folder:

- `evaluation/<setting>/results.jsonl`, `setting.json`, `identity.json`, `videos/*.mp4`: written by
  `mvjax.evaluation.rollout` and `mvjax.identity`;
- `<stage>/metrics.jsonl` of the stages `video` and `action`: one JSON object per logged step with
  "step" and any number of names ending in "loss", which are drawn;
- `predictions/<name>_predicted.mp4` and `<name>_true.mp4`: pairs of videos (H.264), and
  `<name>.json` of `mvjax.evaluation.predictions`, which earlier versions did not write;
- `phases.json`: [{"name": "train video", "seconds": 75.2, "peak_mb": 1450}, ...] in the order they
  ran, peak_mb optional;
- `study/results.json`: [{"label": "trained on video", "demonstrations": 10, "successes": 103,
  "trials": 120}, ...], optional;
- `command.txt`: the exact command that reproduces the run;
- `environment.json`: software and machine, `mvjax.identity.environment`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.atomic import write_json, write_text
from data_pipelines.html import file_uri, render
from mvjax.evaluation.closed_loop import SuccessRate, mean_success, success_rate, success_table
from mvjax.evaluation.figures import Curve, loss_figure, success_figure
from mvjax.evaluation.rollout import EpisodeResult, Setting, read_results, read_setting
from mvjax.identity import described, different, digest_of, environment, read_identity
from mvjax.training.metrics import read_records

STAGES = {"Stage 1: video model": "video", "Stage 2: action decoder": "action"}
JOINT = {"Joint training": "joint"}  # which few runs have
ROLLOUTS_PER_TASK = 3
MODES = ("policy", "oracle", "expert", "none")  # in the order of the report


def build_report(run_dir: Path, out: Path) -> None:
    """Writes the report of a run folder that holds any of the files above."""
    if not run_dir.is_dir():
        raise FileNotFoundError(f"There is no run folder {run_dir}.")
    study, command = _read_study(run_dir / "study" / "results.json"), run_dir / "command.txt"
    run = {
        "predictions": list(_read_predictions(run_dir / "predictions")),
        "predicted_by": read_identity(run_dir / "predictions"),
        "losses": {
            title: loss_figure(curves, f"{title}: loss") if curves else None
            for title, folder in (STAGES | (JOINT if (run_dir / "joint").is_dir() else {})).items()
            for curves in [_read_losses(run_dir / folder)]
        },
        "study": study,
        "study_figure": study
        and success_figure(study, "action demonstrations per task", "Sample efficiency"),
        "phases": _read_json(run_dir / "phases.json", []),
        "command": command.read_text().strip() if command.exists() else "",
        "environment": _read_json(run_dir / "environment.json", {}),
    }
    _write(out, f"Run {run_dir.resolve().name}", run_dir / "evaluation", run)


def build_evaluation_report(folder: Path) -> Path:
    """Writes `report.html` of a folder that `launch.evaluate` has filled, and returns its path."""
    _write(folder / "report.html", f"Evaluation in {folder}", folder)
    return folder / "report.html"


def _write(out: Path, title: str, results: Path, run: dict[str, Any] | None = None) -> None:
    evaluations = read_evaluations(results)
    main = main_evaluation(evaluations)
    columns = [main] if main else []
    columns += [e for e in evaluations if e.setting.mode in ("expert", "none") and e is not main]
    rates = [{rate.name: rate for rate in column.tasks} for column in columns]
    tasks = dict.fromkeys(task for column in rates for task in column)
    page = render(
        "report.html",
        "mvjax.evaluation",
        title=title,
        main=main,
        evaluations=evaluations,
        rollouts=list(_rollouts(main)) if main else [],
        rollouts_per_task=ROLLOUTS_PER_TASK,
        columns=columns,
        tasks=[(task, [column.get(task) for column in rates]) for task in tasks],
        sweep=_sweep(evaluations),
        delays=_delays(evaluations),
        identities=_identities(evaluations),
        mixed=_mixed(evaluations, (run or {}).get("predicted_by")),
        run=run,
        percent=percent,
        interval=interval,
        duration=duration,
        memory=memory,
    )
    write_text(out, page)


# Evaluations.


@dataclass(frozen=True)
class Evaluated:
    """A setting with its episodes, and their success per task and on average."""

    folder: Path
    setting: Setting
    results: list[EpisodeResult]
    tasks: list[SuccessRate]
    mean: SuccessRate
    identity: dict[str, Any] | None  # of `read_identity`; None for results of earlier versions

    @property
    def query_ms(self) -> float | None:
        """Inference time per query in milliseconds; None without queries."""
        queries = sum(result.queries for result in self.results)
        return 1e3 * sum(r.plan_seconds for r in self.results) / queries if queries else None

    @property
    def jump(self) -> float | None:
        """The mean `EpisodeResult.jump`; None without any."""
        jumps = [result.jump for result in self.results if result.jump is not None]
        return float(np.mean(jumps)) if jumps else None

    @property
    def way(self) -> str:
        """Whose policy it is and how its chunks continue one another, for a curve."""
        chunking = self.setting.chunking
        how = "" if chunking == "none" else f"{chunking} chunks"
        return ", ".join(filter(None, (self.setting.variant, how))) or "policy"


def read_evaluations(folder: Path) -> list[Evaluated]:
    """Reads the settings that have at least one finished episode: by mode, then by stop step."""
    evaluations = []
    for path in sorted(folder.glob("*/results.jsonl")):
        results = read_results(path)
        if results and (path.parent / "setting.json").exists():
            # Episodes end in any order; sorting makes the report of a resumed run the same.
            results.sort(key=lambda result: (result.task, result.seed))
            tasks = success_table((result.task, result.success) for result in results)
            setting = read_setting(path.parent)
            mean, identity = mean_success(tasks), read_identity(path.parent)
            evaluations.append(Evaluated(path.parent, setting, results, tasks, mean, identity))
    return sorted(
        evaluations,
        key=lambda e: (MODES.index(e.setting.mode), e.setting.stop_step or 0, e.setting.delay),
    )


def main_evaluation(evaluations: list[Evaluated]) -> Evaluated | None:
    """Returns the setting marked main, else the policy with the fewest video steps.

    A variant is taken only if there is no other policy.
    """
    marked = [evaluated for evaluated in evaluations if evaluated.setting.main]
    policies = [e for e in evaluations if e.setting.mode == "policy"]
    own = [e for e in policies if not e.setting.variant]
    return next(iter(marked + own + policies), None)


def _rollouts(main: Evaluated) -> Iterator[tuple[EpisodeResult, str]]:
    """The first recorded episodes of every task with their videos."""
    for rate in main.tasks:
        recorded = [
            result
            for result in main.results
            if result.task == rate.name and result.video and (main.folder / result.video).exists()
        ]
        for result in recorded[:ROLLOUTS_PER_TASK]:
            yield result, file_uri(main.folder / result.video, "video/mp4")


def _sweep(evaluations: list[Evaluated]) -> str | None:
    """Success over video denoising steps, of every variant with several stop steps."""
    curves: dict[str, list[tuple[int, SuccessRate]]] = {}
    for e in evaluations:
        if e.setting.mode == "policy" and e.setting.stop_step is not None and not e.setting.delay:
            curves.setdefault(e.way, []).append((e.setting.stop_step, e.mean))
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    others = [e for e in evaluations if e.setting.mode != "policy" and not e.setting.variant]
    lines = [replace(e.mean, name=e.setting.label) for e in others]
    steps = "video denoising steps before the context is read"
    return success_figure(curves, steps, "How far to denoise the video", lines)


def _delays(evaluations: list[Evaluated]) -> dict[str, Any] | None:
    """Success over the delay, and a row for each setting of such a curve; None without any."""
    curves: dict[tuple[int, str], list[Evaluated]] = {}
    for e in evaluations:
        if e.setting.mode == "policy" and e.setting.stop_step is not None:
            curves.setdefault((e.setting.stop_step, e.way), []).append(e)
    shown = {key: some for key, some in curves.items() if len(some) > 1}
    if not shown:
        return None
    several = len({stop for stop, _ in shown}) > 1
    points = {
        f"{way}, stop after {stop}" if several else way: [(e.setting.delay, e.mean) for e in some]
        for (stop, way), some in shown.items()
    }
    label = "delay of an answer, control steps"
    figure = success_figure(points, label, "How late an answer may be")
    return {"figure": figure, "rows": [e for some in shown.values() for e in some]}


def _identities(evaluations: Sequence[Evaluated]) -> list[tuple[str, dict[str, str]]]:
    """Settings with an identity in common, and that identity in short."""
    groups: dict[tuple, list[str]] = {}
    for e in evaluations:
        groups.setdefault(tuple(described(e.identity).items()), []).append(e.setting.label)
    return [("; ".join(labels), dict(identity)) for identity, labels in groups.items()]


def _mixed(evaluations: Sequence[Evaluated], predicted: dict[str, Any] | None = None) -> list[str]:
    """Sentences on results that this page puts together although they are not of one policy, one
    simulator or the same tasks: within a setting, between settings, and predicted videos.
    """
    said, first = [], {}
    for e in evaluations[1:]:
        before, tasks = evaluations[0], {rate.name for rate in e.tasks}
        if unlike := tasks ^ {rate.name for rate in before.tasks}:
            said.append(
                f"“{before.setting.label}” and “{e.setting.label}” were not played on the same "
                f"tasks: only one of them has {', '.join(sorted(unlike))}."
            )
    for e in evaluations:
        found = {result.config_hash for result in e.results}
        if e.identity is not None:
            found.add(digest_of(e.identity["what"]))
        if len(found) > 1:
            said.append(
                f"The episodes of “{e.setting.label}” are not all of one identity: their "
                f"config_hash is {', '.join(sorted(found))}."
            )
        if e.identity is None:
            continue
        what = e.identity["what"]
        policy = {k: v for k, v in what.get("policy", {}).items() if k != "sampling"}
        # A variant is another policy on purpose.
        parts = {"simulator": {"suite": what["suite"], "simulator": what["simulator"]}}
        # So is another delay.
        parts |= {"protocol": {k: v for k, v in what["protocol"].items() if k != "delay"}}
        parts |= {"policy": policy} if policy and not e.setting.variant else {}
        for name, part in parts.items():
            label, before = first.setdefault(name, (e.setting.label, part))
            if unlike := different(before, part):
                both = f"“{label}” (there) and “{e.setting.label}” (here)"
                said.append(f"{both} differ in the {name}: {unlike}.")
    if predicted and "policy" in first:
        label, policy = first["policy"]
        networks = [
            {name: what[name] for name in ("backbone", "tokenizer", "text_encoder")}
            for what in (policy, predicted["what"])
        ]
        if unlike := different(*networks):
            said.append(f"“{label}” (there) and the predicted videos (here) differ: {unlike}.")
    return said


# The rest of a run folder.


def _read_losses(workdir: Path) -> dict[str, Curve]:
    """The finite values of every name that ends in "loss"."""
    points: dict[str, dict[int, float]] = {}
    for row in read_records(workdir):
        for name, value in row.items():
            if name.endswith("loss") and isinstance(value, int | float) and np.isfinite(value):
                points.setdefault(name, {})[row["step"]] = value  # a resumed step counts once
    return {
        name: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
        for name, values in points.items()
    }


def _read_study(file: Path) -> dict[str, list[tuple[int, SuccessRate]]]:
    """The sample-efficiency study: label -> sorted (demonstrations, success) pairs."""
    curves: dict[str, list[tuple[int, SuccessRate]]] = {}
    for row in _read_json(file, []):
        rate = success_rate(row["label"], row["successes"], row["trials"])
        curves.setdefault(row["label"], []).append((row["demonstrations"], rate))
    return {label: sorted(points, key=lambda p: p[0]) for label, points in curves.items()}


def _read_predictions(folder: Path) -> Iterator[tuple[dict[str, str], str, str]]:
    """Title and moment, predicted and true video of every complete pair."""
    for predicted in sorted(folder.glob("*_predicted.mp4")):
        name = predicted.name.removesuffix("_predicted.mp4")
        true = predicted.with_name(f"{name}_true.mp4")
        if true.exists():
            shown = {"title": name, "moment": ""}
            if about := _read_json(folder / f"{name}.json", None):
                where = f"{about['dataset']}, {about['episode']}, at {about['seconds']:.2f} s"
                shown = {"title": about["instruction"] or "(no instruction)", "moment": where}
            yield shown, file_uri(predicted, "video/mp4"), file_uri(true, "video/mp4")


def _read_json(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else otherwise


# Numbers for readers.

_SPACE = "\N{NO-BREAK SPACE}"  # a number and its unit stay on one line


def percent(fraction: float) -> str:
    """Formats a fraction as a percentage, with a decimal unless that is 0."""
    return f"{100 * fraction:.1f}".removesuffix(".0") + f"{_SPACE}%"


def interval(rate: SuccessRate) -> str:
    """Formats the Wilson interval in whole percent."""
    return f"{100 * rate.low:.0f}–{100 * rate.high:.0f}{_SPACE}%"


def duration(seconds: float) -> str:
    """Formats seconds, such as 9.8 s, 1 min 15 s or 1 h 2 min."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def memory(megabytes: float | None) -> str:
    """Formats megabytes, such as 640 MB or 1.4 GB; a dash for None."""
    if megabytes is None:
        return "–"
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1024:.1f} GB"


# Software and machine of a run, kept with its results.


def write_environment(run_dir: Path) -> None:
    """Writes `environment.json`."""
    write_json(run_dir / "environment.json", environment())
