"""Late answers: what continuing the chunk at hand is worth, on the quickstart's policy.

    python -m launch.benchmarks.chunking --run=runs/quickstart --folder=runs/chunking

plays the policy with answers that are some control steps late, without chunking and guided, and a
decoder of the same recipe that is trained with given actions (`flow.prefix`). It continues where it
was stopped, prints a table and writes a report. `--size=smoke` does it with the quickstart's run of
that size. What the words mean: docs/serving.md.
"""

import statistics
from pathlib import Path

from absl import flags

from launch.entry import run
from launch.phases import Phase, command, run_phases, training
from mvjax.evaluation.rollout import read_results

RUN = flags.DEFINE_string("run", "runs/quickstart", "Folder of the quickstart's run.")
FOLDER = flags.DEFINE_string("folder", "runs/chunking", "Folder of the results.")
SIZE = flags.DEFINE_enum("size", "full", ["full", "smoke"], "Size of the quickstart's run.")

DELAYS = (0, 2, 4, 8)
CHUNKING = ("none", "prefix", "guided")


def main() -> None:
    """Runs what is missing, and prints a table."""
    if not (Path(RUN.value) / "action").is_dir():
        raise FileNotFoundError(
            f"There is no {RUN.value}/action: run the quickstart first, or give --run."
        )
    folder = Path(FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    run_phases(phases(RUN.value, FOLDER.value, SIZE.value), folder / "phases.json")
    heads = [f"delay {delay}" for delay in DELAYS]
    print(f"| chunking | {' | '.join(heads)} |\n|---|{'---|' * len(DELAYS)}")
    for chunking in CHUNKING:
        print(row(folder / "evaluation", chunking))
    print("Success, and the jump from chunk to chunk in normalised units.")


def phases(run_dir: str, out: str, size: str) -> list[Phase]:
    """One training, with as many given actions as the longest delay, and three evaluations."""
    recipe = "quickstart_action" + ("" if size == "full" else f":{size}")
    settings = f"--config={recipe}", f"--config.run_dir={run_dir}"
    given = f"--config.flow.prefix={max(DELAYS)}"
    found = [training("train with given actions", f"{out}/action", *settings, given)]
    delays = f"--delay={','.join(map(str, DELAYS))}"
    for chunking in CHUNKING:
        ours = chunking == "prefix"
        evaluate = command(
            "launch.evaluate",
            *settings,
            f"--config.sampler.chunking={chunking}",
            f"--checkpoint={out if ours else run_dir}/action",
            f"--out={out}/evaluation",
            delays,
            *(["--variant=prefix"] if ours else []),
        )
        found.append(Phase(f"evaluate: {chunking}", evaluate))
    return found


def row(evaluation: Path, chunking: str) -> str:
    """A line of the table."""
    cells = []
    for delay in DELAYS:
        name = "prefix_policy_k0" if chunking == "prefix" else "policy_k0"
        name += ("" if chunking == "none" else f"_{chunking}") + (f"_delay{delay}" if delay else "")
        results = read_results(evaluation / name / "results.jsonl")
        jumps = [result.jump for result in results if result.jump is not None]
        jump = f"{statistics.mean(jumps):.3f}" if jumps else "–"
        cells.append(f"{statistics.mean(result.success for result in results):.0%}, {jump}")
    return f"| {chunking} | {' | '.join(cells)} |"


if __name__ == "__main__":
    run(main)
