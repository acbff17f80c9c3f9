"""The configuration of a training run, as its checkpoints hold it.

    python -m launch.serve --checkpoint=runs/quickstart/action

`launch.serve` and `launch.evaluate` take it by themselves where no --config is given; settings can
be changed as ever: `--config.evaluation.episodes_per_task=50`. By name it is
`--config=trained:runs/quickstart/action`. The paths in it are those of then: relative ones belong
to the folder in which the run was trained.
"""

from pathlib import Path

from ml_collections import ConfigDict

from mvjax.training.bridge import trained_config


def get_config(workdir: str) -> ConfigDict:
    """Reads the configuration of a training directory.

    Raises:
        ValueError: if it is not one, or holds converted weights.
    """
    try:
        return trained_config(Path(workdir))
    except OSError as error:
        raise ValueError(str(error)) from error
