"""The configuration of a training run, as its checkpoints hold it.

    python -m launch.serve --checkpoint=runs/quickstart/action

`launch.serve` and `launch.evaluate` use it if no --config is given. Settings are changed as usual:
`--config.evaluation.episodes_per_task=50`. Its name is `--config=trained:runs/quickstart/action`.
The paths in it are those of the training: relative paths start in the folder where the run was
trained.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mvjax.training.bridge import read_meta


def get_config(workdir: str) -> ConfigDict:
    """Reads the configuration of a training directory.

    Raises:
        ValueError: if it is not one, or holds converted weights.
    """
    try:
        config = read_meta(Path(workdir)).get("config", {})
    except OSError as error:
        raise ValueError(str(error)) from error
    if "training" not in config:
        raise ValueError(
            f"{workdir} holds converted weights, which know nothing but their network; give "
            "--config=FILE.py, e.g. configs/bridge_action.py."
        )
    return ConfigDict(_with_tuples(config))


def _with_tuples(value: Any) -> Any:
    """JSON made lists of the tuples; only tuples can be changed on a command line."""
    if isinstance(value, dict):
        return {key: _with_tuples(entry) for key, entry in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
