"""Trains the video model (stage 1), the action decoder (stage 2), or both together (joint).

    python -m launch.train --config=configs/quickstart_video.py --workdir=runs/quickstart/video

Change any setting on the command line: --config.optimizer.learning_rate=1e-4. To continue a run
that stopped, repeat its command. To train on several machines, start the command on all of them:
docs/clusters.md. Settings, losses and checkpoints: docs/training.md.
"""

from pathlib import Path

from absl import flags

from launch.entry import config_flag, path_flag, run
from mvjax import parallel
from mvjax.experiment import Experiment
from mvjax.training import run as training
from mvjax.training.memory import keep_freed_memory

CONFIG = config_flag()
WORKDIR = path_flag("workdir", "Folder for checkpoints and logs.")
PROFILE = flags.DEFINE_bool(
    "profile", False, "Write a profiler trace of three steps to WORKDIR/profile."
)


def main() -> None:
    """Trains `config.stage` in `--workdir`."""
    keep_freed_memory()
    with parallel.initialized():
        training.run(
            Experiment.from_config(CONFIG.value), Path(WORKDIR.value), profile=PROFILE.value
        )


if __name__ == "__main__":
    run(main)
