"""The .npz beside a shard: its numeric columns, and the rows of its episodes."""

import zipfile
from pathlib import Path

import numpy as np


def read_columns(shard: Path, *names: str) -> dict[str, np.ndarray]:
    """Some columns of a shard; those that it has not are left out.

    Args:
        shard: the .arrayrecord.
        names: of the columns.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    file = shard.with_suffix(".npz")
    try:
        with np.load(file) as columns:
            return {name: columns[name] for name in names if name in columns}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); delete it and run the encoding "
            "job again"
        ) from error
