"""Weights for the tests of files: tensors of every type, and a small model; and writers."""

import numpy as np

from data_pipelines.atomic import replacing
from mvjax.weights.files import TYPE_NAMES, TorchTensor
from mvjax.weights.pt_files import write_pt
from mvjax.weights.safetensors_files import write_safetensors, write_safetensors_folder


def tensor(array):
    array = np.asarray(array)
    return TorchTensor(array.shape, array.dtype, lambda: array)


def every_type():
    """A tensor of each type and of several shapes, by name."""
    shapes = ((2, 3), (), (0, 4), (1, 5, 1))
    return {
        f"{dtype}.{shape}": tensor(
            np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
        )
        for dtype in TYPE_NAMES
        for shape in shapes
    }


def small():
    rng = np.random.default_rng(0)
    return {f"blocks.{i}.w": tensor(rng.normal(size=(4, 8)).astype(np.float32)) for i in range(3)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        array = found[name].read()
        assert (found[name].shape, found[name].dtype) == (one.shape, one.dtype), name
        assert (array.shape, array.dtype) == (one.shape, one.dtype), name
        assert array.flags.c_contiguous and array.flags.aligned
        assert array.tobytes() == one.read().tobytes(), name
        assert found[name].nbytes == array.nbytes


def to_pt(folder, tensors):
    write_pt(folder / "a.pt", tensors)


def to_safetensors(folder, tensors):
    with replacing(folder / "a.safetensors") as unfinished:
        write_safetensors(unfinished, tensors)


def to_shards(folder, tensors):
    with replacing(folder / "shards") as unfinished:
        write_safetensors_folder(unfinished, tensors, max_shard_bytes=3_000)
