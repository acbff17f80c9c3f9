"""What a policy reads, how its backbone learns, its Euler steps: success, time per query, tokens.

    python -m launch.benchmarks.contexts --folder=runs/contexts

trains, with three seeds each, on the quickstart's demonstrations and with its steps:

- published: a frozen backbone, whose decoder reads the whole clip, most of it noise;
- observed: a frozen backbone trained observed-first, whose decoder reads what is observed alone;
- joint: the same network, but backbone and decoder learn together.

Each is evaluated with 10, 4, 2 and 1 Euler steps for the actions. All of it takes one to two hours
on two CPU cores, and continues where it was stopped. It ends with a table and `figure.svg`.
What came out: docs/results.md.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from configs import quickstart
from data_pipelines.atomic import write_text
from data_pipelines.clip import tokens
from launch.entry import run
from launch.phases import Phase, command, recording, run_phases, training
from mvjax.evaluation.closed_loop import SuccessRate, mean_success, success_table
from mvjax.evaluation.figures import success_figure
from mvjax.evaluation.rollout import EpisodeResult, read_results
from mvjax.experiment import Experiment

FOLDER = flags.DEFINE_string("folder", "runs/contexts", "Folder of the demonstrations and runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Trainings of every kind.", lower_bound=1)
SIZE = flags.DEFINE_enum("size", "full", ("full", "smoke"), "smoke: a few steps of everything.")

EULER_STEPS = (10, 4, 2, 1)  # 10 is published
_ALONE = "--config.evaluation.workers=1", "--config.evaluation.episodes_per_task=2"
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
    run_phases(list(phases(FOLDER.value, SIZE.value, SEEDS.value)), out / "phases.json")
    print("| policy | tokens | Euler steps | success | by seed | ms per query |")
    print("|---|---|---|---|---|---|")
    points = {}
    for kind in KINDS:
        lines, points[kind] = zip(*(row(out, kind, steps) for steps in EULER_STEPS))
        print(*lines, sep="\n")
    title = "Success against the time of a query"
    write_text(out / "figure.svg", str(success_figure(points, "ms per query", title)))
    print(f"The figure is {out / 'figure.svg'}.")


def phases(out: str, size: str, seeds: int) -> Iterator[Phase]:
    """Demonstrations and records once; then for each policy its trainings and, for each number of
    Euler steps, an evaluation and, of the first seed, a few episodes one after the other, whose
    queries are timed.
    """
    recipe = "" if size == "full" else f":{size}"
    shared = f"--config.run_dir={out}"
    config = quickstart.get_config(size)
    for name, what in config.recording.items():
        yield Phase(f"record {name}", recording(what, f"{out}/data/{name}"))
    encode = "launch.encode", f"--config=quickstart{recipe}", shared
    yield Phase("fit the tokenizer", command(*encode, "--only=tokenizer"))
    yield Phase("encode", command(*encode))
    for seed in range(seeds):
        for kind, trainings in KINDS.items():
            folder, what = folder_of(out, kind, seed), f"{kind}, seed {seed}"
            words = f"--config.training.seed={seed}", shared
            if len(trainings) > 1:  # the second reads the first
                words += (f"--config.backbone.checkpoint={folder}/video",)
            for name, configuration, settings in trainings:
                own = f"--config={configuration}{recipe}", *settings
                own += words if name == "action" else words[:2]
                yield training(f"{what}: train {name}", f"{folder}/{name}", *own)
            parts = {"evaluation": ()}
            if seed == 0:  # a query takes as long with other weights
                parts["timed"] = _ALONE
            for steps in EULER_STEPS:
                how = *own, f"--checkpoint={folder}/{name}", "--modes=policy"
                how += (f"--config.sampler.action_steps={steps}",)
                for part, settings in parts.items():
                    results = f"--out={folder}/{part}_{steps}"
                    evaluate = command("launch.evaluate", *how, *settings, results)
                    yield Phase(f"{what}: {part}, {steps} Euler steps", evaluate)


def folder_of(out: str | Path, kind: str, seed: int) -> str:
    """Where the trainings and results of a policy lie."""
    return f"{out}/{kind}_{seed}"


def row(out: Path, kind: str, steps: int) -> tuple[str, tuple[float, SuccessRate]]:
    """A line of the table, and its point in the figure: ms per query, success of all seeds."""

    def results(part: str, seed: int) -> list[EpisodeResult]:
        folder = Path(folder_of(out, kind, seed)) / f"{part}_{steps}"
        return read_results(folder / "policy_k0/results.jsonl")

    by_seed = [results("evaluation", seed) for seed in range(SEEDS.value)]
    success = mean_success(success_table((r.task, r.success) for one in by_seed for r in one))
    counts = ", ".join(f"{sum(r.success for r in one)}/{len(one)}" for one in by_seed)
    timed = results("timed", seed=0)
    query = 1000 * statistics.median(r.plan_seconds / r.queries for r in timed)
    interval = f"{success.rate:.0%} ({success.low:.0%} to {success.high:.0%})"
    line = f"| {kind} | {tokens_of(kind)} | {steps} | {interval} | {counts} | {query:.1f} |"
    return line, (round(query, 1), success)


def tokens_of(kind: str) -> int:
    """Tokens of a query in the video DiT."""
    clip = Experiment.from_config(quickstart.get_config(SIZE.value)).clip
    return sum(map(tokens, clip.read_shapes(observed_only=_OBSERVED[1] in KINDS[kind][-1][2])))


if __name__ == "__main__":
    run(main)
