"""Safetensors that other programs wrote, or damaged."""

import io
import json

import numpy as np
import pytest
from weight_files import assert_same, tensor

from mvjax.weights.files import WeightsError
from mvjax.weights.source import open_weights


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}, "stores w as F4"),
        ({"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, "F99"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "InvalidInfo|invalid shape"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "invalid value"),
        ({"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}, "overflow"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, r"\(\d+ bytes\) is cut off"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "invalid value"),
        ({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "not fully covered"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "invalid length"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 4]}, "invalid type"),
    ],
)
def test_safetensors_that_do_not_add_up(tmp_path, entry, message):
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(WeightsError, match=message):
        open_weights(tmp_path / "a")


def test_tensors_that_share_bytes_are_refused(tmp_path):
    """Places follow each other without gaps, which is how the values are found."""
    for places in (((0, 4), (0, 4)), ((0, 4), (8, 12)), ((4, 8), (8, 12))):
        entries = {
            name: {"dtype": "F32", "shape": [1], "data_offsets": place}
            for name, place in zip("ab", places)
        }
        header = json.dumps(entries).encode()
        (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
        with pytest.raises(WeightsError, match="damaged"):
            open_weights(tmp_path / "a")


def test_unaligned_safetensors_are_read_aligned(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    header["b"] = {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}
    text = json.dumps(header).encode()
    values = np.array([1, 2], np.float32)
    content = io.BytesIO()
    content.write(len(text).to_bytes(8, "little") + text + b"\7" + values.tobytes())
    (tmp_path / "a").write_bytes(content.getvalue())
    assert_same(open_weights(tmp_path / "a"), {"a": tensor(np.uint8([7])), "b": tensor(values)})
