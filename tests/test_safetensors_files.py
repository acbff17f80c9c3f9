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
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, "stores w as F4"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "which is not what F32"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "which is not what F32"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "cut off: .* of"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "damaged safetensors header"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 4]}, "describes w in an unknown way"),
    ],
)
def test_safetensors_that_do_not_add_up(tmp_path, entry, message):
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(WeightsError, match=message):
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
