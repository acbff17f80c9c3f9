"""The sample-efficiency study: few action demonstrations, backbone trained on video or not.

For every number of action demonstrations per task and every seed, the same decoder is trained with
the same budget on two backbones: one that stage 1 trained on all video, for longer than the
quickstart's, and an untrained one. The seed decides the decoder's start, the order of the batches,
the choice of demonstrations and the untrained backbone. Only `launch.quickstart --study` runs this.
"""

import json
from pathlib import Path
from typing import Any

from launch.phases import Phase, python
from mvjax.evaluation.results import read_results

BACKBONES = {"trained": "backbone trained on video", "untrained": "untrained backbone"}


def study_phases(
    run_dir: str, config: Any, video: tuple[str, ...], action: tuple[str, ...]
) -> list[Phase]:
    """Stage 1, then a training and an evaluation per backbone, number of demonstrations and seed.

    Args:
        run_dir: the quickstart's folder; results go to `study/` in it.
        config: `study {video_steps, demonstrations, seeds, steps, episodes_per_task}`.
        video, action: the flags that name the configuration of each stage and the run folder.
    """
    checkpoints = {"trained": f"{run_dir}/study/video", "untrained": ""}
    train = python(
        "launch.train",
        *video,
        *_steps(config.study.video_steps),
        f"--workdir={checkpoints['trained']}",
    )
    phases = [Phase("study: train the backbone", train, f"{checkpoints['trained']}/finished")]
    for backbone, demonstrations, seed in _cells(config):
        folder = _folder(run_dir, backbone, demonstrations, seed)
        flags = [
            *action,
            *_steps(config.study.steps),
            f"--config.backbone.checkpoint={checkpoints[backbone]}",
            f"--config.training.seed={seed}",
            f"--config.training.episodes_per_task={demonstrations}",
            f"--config.evaluation.episodes_per_task={config.study.episodes_per_task}",
        ]
        name = f"{BACKBONES[backbone]}, {demonstrations} demonstrations per task, seed {seed}"
        train = python("launch.train", *flags, f"--workdir={folder}")
        evaluate = python("launch.evaluate", *flags, f"--checkpoint={folder}", f"--out={folder}")
        phases += [
            Phase(f"study: train, {name}", train, f"{folder}/finished"),
            Phase(f"study: play, {name}", evaluate),
        ]
    return phases


def collect_study(run_dir: str, config: Any) -> None:
    """Writes `study/results.json`: successes of all seeds together, per backbone and number."""
    totals: dict[tuple[str, int], list[bool]] = {}
    for backbone, demonstrations, seed in _cells(config):
        folder = Path(_folder(run_dir, backbone, demonstrations, seed))
        results = read_results(folder / "policy_k0" / "results.jsonl")
        totals.setdefault((backbone, demonstrations), []).extend(r.success for r in results)
    rows = [
        {
            "label": BACKBONES[backbone],
            "demonstrations": demonstrations,
            "successes": sum(outcomes),
            "trials": len(outcomes),
        }
        for (backbone, demonstrations), outcomes in totals.items()
    ]
    (Path(run_dir) / "study" / "results.json").write_text(json.dumps(rows, indent=1) + "\n")


def _steps(number: int) -> tuple[str, str]:
    return f"--config.training.steps={number}", f"--config.optimizer.decay_steps={number}"


def _cells(config: Any) -> list[tuple[str, int, int]]:
    return [
        (backbone, demonstrations, seed)
        for seed in range(config.study.seeds)
        for demonstrations in config.study.demonstrations
        for backbone in BACKBONES
    ]


def _folder(run_dir: str, backbone: str, demonstrations: int, seed: int) -> str:
    return f"{run_dir}/study/{backbone}_{demonstrations}_seed{seed}"
