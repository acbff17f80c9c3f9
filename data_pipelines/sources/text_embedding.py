"""T5 embeddings stored beside captions, as Cosmos-Predict2 and mimic-video keep them."""

from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.sources.array_pickle import read_array_pickle
from mvjax.checkpoints.torch_weights.safetensors_files import read_safetensors

KEY = "encoded_text"  # in a safetensors file


def read_text_embedding(path: Path) -> np.ndarray:
    """The embedding of one caption, without the zero rows that pad it.

    Args:
        path: a `.pickle` (a list that holds one array; it is read without being executed), or a
            `.safetensors` with the key "encoded_text".

    Returns:
        float [n, d], in the type it is stored in.

    Raises:
        ValueError: if the file is damaged, or holds anything else.
    """
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)
        if KEY not in tensors:
            raise ValueError(f"{path} has the keys {sorted(tensors)}; {KEY!r} is expected")
        value: Any = np.array(tensors[KEY].read())
    else:
        value = read_array_pickle(path.read_bytes(), path)
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
    if isinstance(value, np.ndarray) and value.ndim == 3 and len(value) == 1:
        value = value[0]
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind in "biuc":
        found = (
            f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value)
        )
        raise ValueError(f"{path} holds {found}; one float array [tokens, width] is expected")
    filled = np.flatnonzero(value.any(axis=1))
    if len(filled) == 0:
        raise ValueError(f"{path} holds only zeros; make the embedding again")
    return value[: filled[-1] + 1]
