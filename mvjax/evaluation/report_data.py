"""Reading a run folder for the report; the files are described in `mvjax.evaluation.report`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvjax.evaluation.results import EpisodeResult, Setting, read_results, read_setting
from mvjax.evaluation.statistics import SuccessRate, mean_success, success_rate, success_table

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
