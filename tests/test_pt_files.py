"""PyTorch's files without PyTorch: their archive, and tensors that are views of its storages."""

import zipfile

import numpy as np
import pytest
from torch_archives import described, rebuild, write_zip
from weight_files import assert_same, every_type, tensor

from mvjax.weights.files import WeightsError
from mvjax.weights.pt_files import write_pt
from mvjax.weights.source import open_weights


def test_storages_are_aligned_and_checksummed(tmp_path):
    write_pt(tmp_path / "a.pt", every_type())
    data = (tmp_path / "a.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            lengths = np.frombuffer(data, "<u2", 2, entry.header_offset + 26)
            assert (entry.header_offset + 30 + int(lengths.sum())) % 64 == 0


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "expected"),
    [
        ((2, 3), (3, 1), 0, [[0, 1, 2], [3, 4, 5]]),
        ((3, 2), (1, 3), 0, [[0, 3], [1, 4], [2, 5]]),
        ((2, 2), (3, 1), 1, [[1, 2], [4, 5]]),
        ((3,), (2,), 1, [1, 3, 5]),
        ((2, 2), (0, 1), 4, [[4, 5], [4, 5]]),
        ((), (), 5, 5),
        ((1, 2), (10**9, 1), 4, [[4, 5]]),
        ((0, 3), (3, 1), 10**6, np.empty((0, 3))),
    ],
)
def test_views_of_a_storage(tmp_path, shape, strides, offset, expected):
    path = described(tmp_path / "a.pt", rebuild(shape, strides, offset))
    assert_same(open_weights(path), {"w": tensor(np.asarray(expected, np.float32))})


def test_nested_dicts_are_joined_by_dots_and_the_rest_is_left_out(tmp_path):
    inner = rebuild((6,), (1,))
    blob = b"c_io\nBytesIO\n)\x81(c_codecs\nencode\n(X\1\0\0\0aX\6\0\0\0latin1tRK\0NtbX\1\0\0\0y"
    opcodes = b"}(X\1\0\0\0x" + blob + inner + b"K\7" + inner + b"X\1\0\0\0n](K\1K\2eu"
    tensors = open_weights(described(tmp_path / "a.pt", opcodes))
    six = tensor(np.arange(6, dtype=np.float32))
    assert_same(tensors, {"w.y": six, "w.7": six})


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (rebuild((7,), (1,)), "24 bytes of values for w, which needs 28"),
        (rebuild((2, 3), (3, 1), offset=1), "24 bytes of values for w, which needs 28"),
        (rebuild((2, 2), (10**12, 1)), "24 bytes of values for w"),
        (rebuild((6,), (-1,)), "invalid type, shape or strides"),
        (rebuild((6,), (1, 1)), "invalid type, shape or strides"),
        (rebuild((6,), (1,), key="7"), "lacks the values of w .data/7"),
        (rebuild((6,), (1,), kind="QInt8Storage"), "would call torch.QInt8Storage"),
    ],
)
def test_tensors_outside_their_storage_are_named(tmp_path, opcodes, message):
    with pytest.raises(WeightsError, match=message):
        open_weights(described(tmp_path / "a.pt", opcodes))


def test_torch_files_of_other_kinds_are_refused(tmp_path):
    good = rebuild((6,), (1,))
    floats = bytes(24)
    for parts, message in (
        ({"data/0": floats, "byteorder": b"big"}, "big-endian"),
        ({"data/0": floats, "constants.pkl": b""}, "TorchScript program"),
    ):
        with pytest.raises(WeightsError, match=message):
            open_weights(described(tmp_path / "a.pt", good, parts))
    write_zip(tmp_path / "a.pt", b"\x80\x02}.", {"data/0": floats}, zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="is compressed"):
        open_weights(tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", w=np.ones(3))
    with pytest.raises(WeightsError, match=r"not one that torch\.save wrote"):
        open_weights(tmp_path / "a.npz")
    for root, message in ((b"K\1", "holds no tensors by name"), (b"}", "holds no tensors")):
        with pytest.raises(WeightsError, match=message):
            open_weights(write_zip(tmp_path / "a.pt", b"\x80\x02" + root + b"."))
    twice = b"}(X\3\0\0\0a.b" + good + b"X\1\0\0\0a}X\1\0\0\0b" + good + b"su"
    with pytest.raises(WeightsError, match=r"two entries called w\.a\.b"):
        open_weights(described(tmp_path / "a.pt", twice))
