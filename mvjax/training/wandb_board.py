"""The run at Weights & Biases, for those who have installed `wandb` and set `config.wandb`."""

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def require_wandb(project: str) -> ModuleType:
    """The package, without which a run cannot be shown in this project.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"config.wandb is {project!r}, but the package wandb is not installed: "
            'pip install wandb, or leave config.wandb="".'
        ) from error


def open_wandb(project: str, workdir: Path, config: Any) -> "WandbBoard":
    """Begins the run of a training directory, or goes on with it.

    Args:
        project: Name of the project there.
        workdir: The training directory; its name is the run's.
        config: JSON-able settings to show.

    Raises:
        ValueError: If the package is not installed.
    """
    wandb = require_wandb(project)
    name = workdir / "wandb_id"  # an interrupted run goes on under its own number
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:12])
    run = wandb.init(
        project=project,
        name=workdir.name,
        id=name.read_text().strip(),
        dir=str(workdir),
        resume="allow",
        config=config,
    )
    return WandbBoard(wandb, run)


class WandbBoard:
    """One open run."""

    def __init__(self, wandb: Any, run: Any):
        self._wandb, self._run = wandb, run

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Adds scalars."""
        self._run.log(dict(values), step=step)

    def show(self, pictures: Mapping[str, np.ndarray], step: int) -> None:
        """Adds pictures, uint8 [h, w, 3]."""
        self._run.log({name: self._wandb.Image(p) for name, p in pictures.items()}, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
