"""The configuration of a training run, as its checkpoints hold it.

    python -m launch.serve --checkpoint=runs/quickstart/action

`launch.serve` and `launch.evaluate` use it if no --config is given. Settings are changed as usual:
`--config.evaluation.episodes_per_task=50`. Its name is `--config=trained:runs/quickstart/action`.
The paths in it are those of the training: relative paths start in the folder where the run was
trained.
"""

from pathlib import Path

from ml_collections import ConfigDict

from mvjax.training.directory import trained_config


def get_config(workdir: str) -> ConfigDict:
    """Reads the configuration of a training directory.

    Raises:
        ValueError: if it is not one, or holds converted weights.
    """
    try:
        return trained_config(Path(workdir))
    except OSError as error:
        raise ValueError(str(error)) from error
