"""Trains one stage.

    python -m launch.train --config=configs/quickstart_video.py --workdir=runs/quickstart/video

Any setting can be changed on the command line: --config.optimizer.learning_rate=1e-4. Run the same
command again to continue an interrupted run.
"""

from pathlib import Path

from launch.entry import config_flag, path_flag, run
from mvjax.training import run as training

CONFIG = config_flag()
WORKDIR = path_flag("workdir", "Receives checkpoints and metrics.")


def main() -> None:
    """Trains `config.stage` in `--workdir`."""
    training.run(CONFIG.value, Path(WORKDIR.value))


if __name__ == "__main__":
    run(main)
