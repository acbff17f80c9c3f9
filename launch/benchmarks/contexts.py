"""What a policy reads and how its backbone learns: success, time per query, tokens.

    python -m launch.benchmarks.contexts --folder=runs/contexts

trains and evaluates, with three seeds each, on the quickstart's demonstrations and with its steps:

- published: a frozen backbone, whose decoder reads the whole clip, most of it noise;
- observed: a frozen backbone trained observed-first, whose decoder reads what is observed alone;
- joint: the same network, but backbone and decoder learn together.

It takes about an hour and a half on two CPU cores, and continues where it was stopped. It ends with
a table and `figure.svg`. What came out: docs/results.md.
"""

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from configs import quickstart
from data_pipelines.atomic import write_text
from data_pipelines.clip import tokens
from launch.entry import run
from launch.phases import Phase, run_phases
from mvjax.evaluation.closed_loop import SuccessRate, mean_success, success_table
from mvjax.evaluation.figures import success_figure
from mvjax.evaluation.rollout import EpisodeResult, read_results
from mvjax.experiment import Experiment

FOLDER = flags.DEFINE_string("folder", "runs/contexts", "Folder of the demonstrations and runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Trainings of every kind.", lower_bound=1)
SIZE = flags.DEFINE_enum("size", "full", ("full", "smoke"), "smoke: a few steps of everything.")

_FIRST = "--config.video_model.attention_to=observed_first"
_OBSERVED = (_FIRST, "--config.context_frames=observed")
# Kind of policy -> the trainings that make it, (name, configuration, settings), the policy last.
KINDS = {
    "published": (("video", "quickstart_video", ()), ("action", "quickstart_action", ())),
    "observed": (
        ("video", "quickstart_video", (_FIRST,)),
        ("action", "quickstart_action", _OBSERVED),
    ),
    "joint": (("joint", "quickstart_joint", _OBSERVED),),
}


def main() -> None:
    """Runs what is missing; prints a table and draws the figure."""
    out = Path(FOLDER.value)
    run_phases(list(phases(FOLDER.value)), out / "phases.json")
    print("| policy | tokens | success | by seed | ms per query |\n|---|---|---|---|---|")
    points = {}
    for kind in KINDS:
        line, point = row(out, kind)
        print(line)
        points[kind] = [point]
    title = "Success against the time of a query"
    write_text(out / "figure.svg", str(success_figure(points, "ms per query", title)))
    print(f"The figure is {out / 'figure.svg'}.")


def phases(out: str) -> Iterator[Phase]:
    """Demonstrations and records once; then for each policy its trainings, an evaluation, and a few
    episodes one after the other, whose queries are timed.
    """
    recipe = "" if SIZE.value == "full" else f":{SIZE.value}"
    shared = f"--config.run_dir={out}"
    config = quickstart.get_config(SIZE.value)
    for name, what in config.recording.items():
        record = (
            f"--out={out}/data/{name}",
            f"--kind={what.kind}",
            f"--tasks={','.join(what.tasks)}",
            f"--episodes={what.episodes}",
            f"--seed={what.seed}",
        )
        yield Phase(f"record {name}", _command("launch.record", *record))
    encode = "launch.encode", f"--config=quickstart{recipe}", shared
    yield Phase("fit the tokenizer", _command(*encode, "--only=tokenizer"))
    yield Phase("encode", _command(*encode))
    for seed in range(SEEDS.value):
        for kind, trainings in KINDS.items():
            folder, what = folder_of(out, kind, seed), f"{kind}, seed {seed}"
            words = f"--config.training.seed={seed}", shared
            if len(trainings) > 1:  # the second reads the first
                words += (f"--config.backbone.checkpoint={folder}/video",)
            for name, configuration, settings in trainings:
                own = f"--config={configuration}{recipe}", *settings
                own += words if name == "action" else words[:2]
                command = _command("launch.train", *own, f"--workdir={folder}/{name}")
                yield Phase(f"{what}: train {name}", command, f"{folder}/{name}/finished")
            how = *own, f"--checkpoint={folder}/{name}", "--modes=policy"
            evaluate = _command("launch.evaluate", *how, f"--out={folder}/evaluation")
            yield Phase(f"{what}: evaluate", evaluate)
            alone = "--config.evaluation.workers=1", "--config.evaluation.episodes_per_task=2"
            timed = _command("launch.evaluate", *how, *alone, f"--out={folder}/timed")
            yield Phase(f"{what}: time a query", timed)


def folder_of(out: str | Path, kind: str, seed: int) -> str:
    """Where the trainings and results of a policy lie."""
    return f"{out}/{kind}_{seed}"


def _command(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def row(out: Path, kind: str) -> tuple[str, tuple[float, SuccessRate]]:
    """A line of the table, and its point in the figure: ms per query, success of all seeds."""

    def results(part: str) -> list[list[EpisodeResult]]:
        folders = (Path(folder_of(out, kind, seed)) / part for seed in range(SEEDS.value))
        return [read_results(folder / "policy_k0/results.jsonl") for folder in folders]

    by_seed = results("evaluation")
    success = mean_success(success_table((r.task, r.success) for one in by_seed for r in one))
    counts = ", ".join(f"{sum(r.success for r in one)}/{len(one)}" for one in by_seed)
    timed = [r for one in results("timed") for r in one]
    query = 1000 * statistics.median(r.plan_seconds / r.queries for r in timed)
    interval = f"{success.rate:.1%} ({success.low:.1%} to {success.high:.1%})"
    read = tokens_of(kind)
    return f"| {kind} | {read} | {interval} | {counts} | {query:.1f} |", (query, success)


def tokens_of(kind: str) -> int:
    """Tokens of a query in the video DiT."""
    clip = Experiment.from_config(quickstart.get_config(SIZE.value)).clip
    return sum(map(tokens, clip.read_shapes(observed_only=_OBSERVED[1] in KINDS[kind][-1][2])))


if __name__ == "__main__":
    run(main)
