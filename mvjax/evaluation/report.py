"""One self-contained HTML file about a run: results, videos, losses, time, how to repeat it.

It needs no network, no JavaScript and no other file. It can be drawn at any time; what a run has
not produced yet is said in a line. All it reads lies in the run folder:

- `evaluation/<setting>/results.jsonl`, `setting.json`, `videos/*.mp4`: see
  `mvjax.evaluation.results`, which writes them;
- `<stage>/metrics.jsonl` of the stages `video` and `action`: one JSON object per
  logged step with "step" and any number of names ending in "loss" (the curves drawn);
- `predictions/<name>_predicted.mp4` and `<name>_true.mp4`: pairs of videos (H.264);
- `phases.json`: [{"name": "train video", "seconds": 75.2, "peak_mb": 1450}, ...] in the order they
  ran, peak_mb optional;
- `study/results.json`: [{"label": "trained on video", "demonstrations": 10, "successes": 103,
  "trials": 120}, ...], optional;
- `command.txt`: the exact command that repeats the run;
- `environment.json`: see `mvjax.evaluation.environment`, which writes it.
"""

from html import escape
from pathlib import Path
from string import Template

from mvjax.evaluation import report_data as data
from mvjax.evaluation import report_sections as sections

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
    evaluations = data.read_evaluations(run_dir / "evaluation")
    main = data.main_evaluation(evaluations)
    phases = data.read_phases(run_dir)
    command = run_dir / "command.txt"
    losses = {
        title: data.read_losses(run_dir / folder / "metrics.jsonl")
        for title, folder in STAGES.items()
    }
    body = [
        sections.headline(main, evaluations, sum(phase["seconds"] for phase in phases)),
        sections.rollouts(main),
        sections.success(main, evaluations),
        sections.sweep(evaluations),
        sections.settings(evaluations),
        sections.predictions(data.read_predictions(run_dir)),
        sections.losses(losses),
        sections.study(data.read_study(run_dir)),
        sections.phases(phases),
        sections.reproduce(
            command.read_text().strip() if command.exists() else "", data.read_environment(run_dir)
        ),
    ]
    _write(out, f"Run {run_dir.resolve().name}", body)


def build_evaluation_report(folder: Path) -> Path:
    """Draws `report.html` of the settings in a folder of results, and returns its path.

    Args:
        folder: with `<setting>/results.jsonl` and the rest, as `python -m launch.evaluate` leaves.
    """
    evaluations = data.read_evaluations(folder)
    main = data.main_evaluation(evaluations)
    body = [
        sections.headline(main, evaluations, 0.0),
        sections.rollouts(main),
        sections.success(main, evaluations),
        sections.sweep(evaluations),
        sections.settings(evaluations),
    ]
    return _write(folder / "report.html", f"Evaluation in {folder}", body)


def _write(out: Path, title: str, body: list[str]) -> Path:
    template = Template(Path(__file__).with_name("report.html").read_text())
    page = template.substitute(title=escape(title), body="\n".join(body))
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page)
    return partial.replace(out)
