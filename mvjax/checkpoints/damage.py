"""What to do about a checkpoint that cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from mvjax.checkpoints.tree_match import CheckpointMismatch

# Errors that come while a sound checkpoint is read.
NOT_ITS_FAULT = (CheckpointMismatch, jax.errors.JaxRuntimeError, MemoryError)


@contextmanager
def said(where: Path) -> Iterator[None]:
    """Inside the block, whatever is wrong with the checkpoint at `where` becomes one sentence.

    Raises:
        OSError: If it is damaged: orbax and tensorstore raise many kinds, few of which name it.
    """
    try:
        yield
    except NOT_ITS_FAULT:
        raise
    except Exception as error:
        raise OSError(
            f"the checkpoint {where} cannot be read ({reason(error)}); bring back a copy, or move "
            "it away: then the one before it is used."
        ) from error


def reason(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
