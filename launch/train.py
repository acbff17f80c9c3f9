"""Trains one stage.

    python -m launch.train --config=configs/quickstart_video.py --workdir=runs/quickstart/video

Any setting can be changed on the command line: --config.optimizer.learning_rate=1e-4. Run the same
command again to continue an interrupted run. On several machines, start it in all of them:
docs/clusters.md.
"""

from pathlib import Path

from absl import flags

from launch.entry import config_flag, path_flag, run
from mvjax import parallel
from mvjax.experiment import Experiment
from mvjax.training import run as training
from mvjax.training.memory import keep_freed_memory

CONFIG = config_flag()
WORKDIR = path_flag("workdir", "Folder that receives checkpoints and metrics.")
PROFILE = flags.DEFINE_bool("profile", False, "Trace three steps into WORKDIR/profile.")


def main() -> None:
    """Trains `config.stage` in `--workdir`."""
    keep_freed_memory()
    with parallel.initialized():
        training.run(
            Experiment.from_config(CONFIG.value), Path(WORKDIR.value), profile=PROFILE.value
        )


if __name__ == "__main__":
    run(main)
