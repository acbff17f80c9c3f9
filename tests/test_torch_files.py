"""Reading and writing PyTorch's files without PyTorch: what is kept, and what is refused."""

import io
import json
import pickle
import random
import resource
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mvjax.checkpoints.torch_weights.dtypes import TYPE_NAMES
from mvjax.checkpoints.torch_weights.open import open_weights
from mvjax.checkpoints.torch_weights.pt_writer import write_pt
from mvjax.checkpoints.torch_weights.safetensors_files import (
    write_safetensors,
    write_safetensors_folder,
)
from mvjax.checkpoints.torch_weights.tensors import TorchTensor, WeightsError


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


def write_zip(path, description, parts=None, compression=zipfile.ZIP_STORED):
    """A PyTorch file from a pickle and {entry: bytes}."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {"data.pkl": description, "version": b"3\n", **(parts or {})}.items():
            archive.writestr(f"archive/{name}", data)
    return path


def rebuild(shape, strides, offset=0, key="0", kind="FloatStorage"):
    """Opcodes of one float32 tensor."""
    text = lambda t: pickle.SHORT_BINUNICODE + bytes([len(t)]) + t.encode()  # noqa: E731
    ints = lambda *n: b"(" + b"".join(b"I%d\n" % i for i in n) + b"t"  # noqa: E731
    storage = b"(" + text("storage") + b"ctorch\n%s\n" % kind.encode()
    storage += text(key) + text("cpu") + b"K\x06tQ"
    args = storage + b"I%d\n" % offset + ints(*shape) + ints(*strides)
    return b"ctorch._utils\n_rebuild_tensor\n(" + args + b"tR"


def described(path, opcodes, parts=None):
    """A file whose root is {"w": what the opcodes leave}, with six floats in storage 0."""
    floats = np.arange(6, dtype=np.float32).tobytes()
    return write_zip(path, b"\x80\x02}X\x01\0\0\0w" + opcodes + b"s.", parts or {"data/0": floats})


@pytest.mark.parametrize("write", [write_pt, write_safetensors])
def test_every_type_and_shape_comes_back(tmp_path, write):
    tensors = every_type()
    if write is write_safetensors:  # the format has no complex128
        tensors = {name: t for name, t in tensors.items() if t.dtype != np.complex128}
    path = tmp_path / "named.anything"  # the content tells what it is
    write(path, tensors)
    assert_same(open_weights(path), tensors)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_equal_weights_give_equal_files(tmp_path):
    for write in (write_pt, write_safetensors):
        write(tmp_path / "a", small())
        write(tmp_path / "b", small())
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


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


class _Runs:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, flag):
        self.command = f"touch {flag}"

    def __reduce__(self):
        import os

        return os.system, (self.command,)


class _Evaluates(_Runs):
    def __reduce__(self):
        return eval, ("__import__('os')." + self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(("kind", "name"), [(_Runs, "system"), (_Evaluates, "builtins.eval")])
def test_a_pickle_that_would_run_code_is_named_and_not_run(tmp_path, kind, name, protocol):
    flag = tmp_path / "ran"
    bad = pickle.dumps({"w": [{"deep": kind(flag)}]}, protocol)
    with pytest.raises(WeightsError, match=rf"a\.pt would call \w*\.?{name}; .* only tensors"):
        open_weights(write_zip(tmp_path / "a.pt", bad))
    assert not flag.exists()


@pytest.mark.parametrize(
    ("opcodes", "name"),
    [
        (b"cbuiltins\ngetattr\n(K\1K\2tR", "would call builtins.getattr"),
        (b"c__builtin__\n__import__\n(K\1tR", "would call builtins.__import__"),
        (b"\x8c\x02os\x8c\x06system\x93(K\1tR", "would call os.system"),
        (b"(X\1\0\0\0aios\nsystem\n", "would call os.system"),
        (b"ctorch.serialization\nload\n(K\1tR", "would call torch.serialization.load"),
        (b"ctorch\n_utils.os.system\n(K\1tR", "would call torch._utils.os.system"),
        (b"ctorch\nFloatStorage.__init__\n)R", "would call torch.FloatStorage.__init__"),
        # The state of an object whose class would take it as a call.
        (b"c_io\nBytesIO\n)\x81}X\x0c\0\0\0__setstate__cposix\nsystem\nsb", "posix.system"),
        (b"ccollections\nOrderedDict\n}X\7\0\0\0__new__cos\nsystem\nsb", "os.system"),
        # Calls of what is no function, and of what another module may have registered.
        (b"X\1\0\0\0a(K\1tR", "called that is no function"),
        (b"ctorch\nFloatStorage\n(K\1tR", "called that is no function"),
        (b"ctorch\nfloat32\n(K\1tR", "called that is no function"),
        (b"\x82\x01", "EXT1"),
        (b"(K\1o", "OBJ"),
        (b"ctorch._utils\n_rebuild_tensor\n)R", "unknown arguments"),
        (b"ctorch._utils\n_rebuild_parameter\n(K\1tR", "unknown arguments"),
    ],
)
def test_no_opcode_calls_anything(tmp_path, opcodes, name):
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        open_weights(described(tmp_path / "a.pt", opcodes))


def test_setting_the_state_of_a_name_changes_nothing(tmp_path):
    """BUILD on a function or class sets its attributes in a real unpickler."""
    poison = b"ctorch._utils\n_rebuild_tensor\n}X\4\0\0\0namesX\1\0\0\0bsb0"
    path = described(tmp_path / "a.pt", poison.replace(b"names", b"name") + rebuild((6,), (1,)))
    assert open_weights(path)["w"].shape == (6,)


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"}r\xff\xff\xff\x7f", "holds no tensors"),  # a memo of two thousand million places
        (b"}q\1X\1\0\0\0ah\1s", "more than 32 deep"),  # a dict that holds itself
        # A dict that doubles thirty times, and a key that takes 2**60 steps to hash.
        (b"}" + b"q\0010}(X\1\0\0\0ah\1X\1\0\0\0bh\1u" * 30, "more than a million entries"),
        (b"}(K\1" + b"q\1h\1\x86" * 60 + b"K\1u", "keys that are no names"),
        (b"B\xff\xff\xff\x7f", "expected 2147483647 bytes"),
    ],
)
def test_a_small_file_cannot_exhaust_the_reader(tmp_path, opcodes, message):
    with pytest.raises(WeightsError, match=message):
        open_weights(described(tmp_path / "a.pt", opcodes))


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (rebuild((7,), (1,)), "24 bytes of values for w, which needs 28"),
        (rebuild((2, 3), (3, 1), offset=1), "24 bytes of values for w, which needs 28"),
        (rebuild((2, 2), (10**12, 1)), "24 bytes of values for w"),
        (rebuild((6,), (-1,)), "sizes that are no sizes"),
        (rebuild((6,), (1, 1)), "more sizes than strides"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is a text file", "neither a file of torch.save nor safetensors"),
        (pickle.dumps({"a": 1}, 2), "bare pickle"),
        (bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + b"...", "before 1.6"),
        (bytes(257) + b"ustar\0" + bytes(300), "tar archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\3\4" + bytes(1000), r"is cut off: .* \(0\.0 MB on disk\)"),
        ((2**40).to_bytes(8, "little") + b"{}", "header of 1,099,511,627,776 bytes"),
        ((64).to_bytes(8, "little") + b'{"a":', "do not even hold its header"),
        ((2).to_bytes(8, "little") + b"{]", "damaged safetensors header"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
    ],
)
def test_what_is_no_weights_file_is_told(tmp_path, content, message):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        open_weights(tmp_path / "model.pt")


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


@pytest.mark.parametrize("write", [write_pt, write_safetensors])
def test_any_damage_is_a_weights_error(tmp_path, write):
    rng = random.Random(0)
    write(tmp_path / "a", small())
    good = (tmp_path / "a").read_bytes()
    for round in range(400):
        bad = bytearray(good)
        if round % 4 == 0:
            bad = bad[: rng.randrange(len(bad))]
        for _ in range(round % 4):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        (tmp_path / "a").write_bytes(bad)
        try:
            for one in open_weights(tmp_path / "a").values():
                one.read()
        except WeightsError:
            pass


def test_damaged_descriptions_are_weights_errors(tmp_path):
    rng = random.Random(0)
    write_pt(tmp_path / "a", small())
    with zipfile.ZipFile(tmp_path / "a") as archive:
        good = archive.read("archive/data.pkl")
    storages = {f"data/{i}": bytes(128) for i in range(3)}
    for _ in range(400):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            open_weights(write_zip(tmp_path / "a", bytes(bad), storages))
        except WeightsError:
            pass


def test_folders(tmp_path):
    write_safetensors_folder(tmp_path / "one", small(), stem="model")
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    assert_same(open_weights(tmp_path / "one"), small())

    folder = tmp_path / "many"
    write_safetensors_folder(folder, small(), max_shard_bytes=256)
    stem = "diffusion_pytorch_model"
    shards = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = f"{stem}.safetensors.index.json"
    assert sorted(p.name for p in folder.iterdir()) == [*shards, index]
    assert json.loads((folder / index).read_text()) == {
        "metadata": {"total_size": 3 * 128},
        "weight_map": dict(zip(small(), [shards[0], shards[0], shards[1]])),
    }
    assert_same(open_weights(folder), small())

    (folder / shards[1]).rename(folder / "elsewhere")
    with pytest.raises(WeightsError, match=f"many lacks {shards[1]}, named in {index}"):
        open_weights(folder)
    write_safetensors(folder / shards[1], {"other": tensor(np.ones(2))})
    with pytest.raises(WeightsError, match=r"says that blocks\.2\.w is in .*-00002-of-00002"):
        open_weights(folder)
    (folder / index).write_text('{"weight_map": {"w": "../secret"}}')
    with pytest.raises(WeightsError, match=r"outside its folder: \.\./secret"):
        open_weights(folder)
    (folder / index).write_text("[1]")
    with pytest.raises(WeightsError, match="is no index of weights"):
        open_weights(folder)


def test_fewer_shards_replace_more(tmp_path):
    write_safetensors_folder(tmp_path, small(), max_shard_bytes=1)
    write_safetensors(tmp_path / "diffusion_pytorch_model.fp16.safetensors", small())
    write_safetensors_folder(tmp_path, small(), max_shard_bytes=256)
    assert len(list(tmp_path.glob("*-of-*"))) == 2
    write_safetensors_folder(tmp_path, small())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "diffusion_pytorch_model.fp16.safetensors",  # not of this stem
        "diffusion_pytorch_model.safetensors",
    ]
    with pytest.raises(WeightsError, match=r"several weights files .* give one of them"):
        open_weights(tmp_path)


def test_folders_of_torch_files(tmp_path):
    first, second = dict(list(small().items())[:1]), dict(list(small().items())[1:])
    write_pt(tmp_path / "pytorch_model-00001-of-00002.bin", first)
    write_pt(tmp_path / "pytorch_model-00002-of-00002.bin", second)
    files = {name: "pytorch_model-00001-of-00002.bin" for name in first}
    files |= {name: "pytorch_model-00002-of-00002.bin" for name in second}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert_same(open_weights(tmp_path), small())

    index.unlink()
    with pytest.raises(WeightsError, match=r"several weights files .*00001-of-00002\.bin, "):
        open_weights(tmp_path)
    write_pt(tmp_path / "pytorch_model.bin", small())
    assert_same(open_weights(tmp_path), small())
    write_safetensors(tmp_path / "model.safetensors", first)  # is preferred
    assert_same(open_weights(tmp_path), first)


def test_folders_without_weights(tmp_path):
    with pytest.raises(WeightsError, match="missing does not exist"):
        open_weights(tmp_path / "missing")
    with pytest.raises(WeightsError, match="holds no weights file"):
        open_weights(tmp_path)
    (tmp_path / "transformer").mkdir()
    with pytest.raises(WeightsError, match="give one of its folders: transformer"):
        open_weights(tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(WeightsError, match=r"distributed checkpoint; .*dcp_to_torch"):
        open_weights(tmp_path)


def to_pt(folder, tensors):
    write_pt(folder / "a.pt", tensors)


def to_safetensors(folder, tensors):
    write_safetensors(folder / "a.safetensors", tensors)


def to_shards(folder, tensors):
    write_safetensors_folder(folder, tensors, max_shard_bytes=3_000)


@pytest.mark.parametrize("write", [to_pt, to_safetensors, to_shards])
def test_a_full_disk_leaves_nothing_behind(tmp_path, write):
    big = {str(i): tensor(np.ones(500, np.float32)) for i in range(3)}
    big["3"] = tensor(np.ones(1_000_000, np.float32))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [to_pt, to_safetensors, to_shards])
def test_a_tensor_that_fails_leaves_the_earlier_file(tmp_path, write):
    write(tmp_path, small())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    lying = TorchTensor((3,), np.dtype(np.float32), lambda: np.ones(4, np.float32))
    with pytest.raises(WeightsError, match=r"w reads as float32\(4,\), but declares float32\(3,\)"):
        write(tmp_path, small() | {"w": lying})
    for text in (np.array(["a"]), np.ones(2, ml_dtypes.int4)):
        with pytest.raises(WeightsError, match="no type for w"):
            write(tmp_path, {"w": tensor(text)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_one_tensor_is_held(tmp_path):
    """Tensors are read in turn, each after the one before was written and let go."""
    alive, most = set(), 0

    class Counted(np.ndarray):
        def __del__(self):
            alive.discard(id(self))

    def read():
        nonlocal most
        array = np.ones(8, np.float32).view(Counted)
        alive.add(id(array))
        most = max(most, len(alive))
        return array

    tensors = {str(i): TorchTensor((8,), np.dtype(np.float32), read) for i in range(5)}
    for write in (to_pt, to_safetensors, to_shards):
        write(tmp_path, tensors)
    assert most == 1


def test_strided_values_are_written_in_their_own_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    for write, name in ((to_pt, "a.pt"), (to_safetensors, "a.safetensors")):
        write(tmp_path, {"w": tensor(array)})
        np.testing.assert_array_equal(open_weights(tmp_path / name)["w"].read(), array)


def test_unaligned_safetensors_are_read_aligned(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    header["b"] = {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}
    text = json.dumps(header).encode()
    values = np.array([1, 2], np.float32)
    content = io.BytesIO()
    content.write(len(text).to_bytes(8, "little") + text + b"\7" + values.tobytes())
    (tmp_path / "a").write_bytes(content.getvalue())
    assert_same(open_weights(tmp_path / "a"), {"a": tensor(np.uint8([7])), "b": tensor(values)})


def test_torch_is_not_imported():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['safetensors'] = None\n"
        "import mvjax.checkpoints.torch_weights.open, mvjax.checkpoints.torch_weights.pt_writer"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_both_ways_agree(tmp_path):
    """Through one format and the other, back to the first: nothing changes."""
    write_pt(tmp_path / "a.pt", small())
    write_safetensors(tmp_path / "b.safetensors", open_weights(tmp_path / "a.pt"))
    write_pt(tmp_path / "c.pt", open_weights(tmp_path / "b.safetensors"))
    assert_same(open_weights(tmp_path / "c.pt"), small())
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "c.pt").read_bytes()
