"""Weights in files and folders: what is kept, what is refused, what a failure leaves."""

import json
import pickle
import random
import resource
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from weight_files import assert_same, every_type, small, tensor, to_pt, to_safetensors, to_shards

from mvjax.weights.files import TorchTensor, WeightsError
from mvjax.weights.pt_files import write_pt
from mvjax.weights.safetensors_files import write_safetensors, write_safetensors_folder
from mvjax.weights.source import open_weights


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
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b"\x1f\x8b\x08" + bytes(9), "is compressed"),
        (b"GGUF" + bytes(9), "a GGUF file"),
        (bytes(600), "begins with zeros"),
        (b'{"architectures": ["T5"]}', "is JSON; give the weights file"),
        (b"PK\3\4" + bytes(1000), r"is cut off: .* \(0\.0 MB on disk\)"),
        ((2**40).to_bytes(8, "little") + b"{}", "damaged .*header too large"),
        ((64).to_bytes(8, "little") + b'{"a":', "is cut off or damaged"),
        ((2).to_bytes(8, "little") + b"{]", r"is cut off or damaged .*header"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
    ],
)
def test_what_is_no_weights_file_is_told(tmp_path, content, message):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        open_weights(tmp_path / "model.pt")


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


@pytest.mark.parametrize("write", [to_pt, to_safetensors])
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


def test_torch_is_not_imported():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import mvjax.weights.source, mvjax.weights.pt_files"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_both_ways_agree(tmp_path):
    """Through one format and the other, back to the first: nothing changes."""
    write_pt(tmp_path / "a.pt", small())
    write_safetensors(tmp_path / "b.safetensors", open_weights(tmp_path / "a.pt"))
    write_pt(tmp_path / "c.pt", open_weights(tmp_path / "b.safetensors"))
    assert_same(open_weights(tmp_path / "c.pt"), small())
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "c.pt").read_bytes()


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
    for text, words in (
        ("[1]", "damaged"),
        ("{}", "lacks 'weight_map'"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ):
        (folder / index).write_text(text)
        with pytest.raises(WeightsError, match=rf"index\.json is.*{words}"):
            open_weights(folder)


def test_a_folder_of_two_models(tmp_path):
    write_safetensors(tmp_path / "diffusion_pytorch_model.fp16.safetensors", small())
    write_safetensors_folder(tmp_path, small())
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
    for left in (2, 1):  # also where one of them is not there
        missing = r"shards \(.*-of-00002\.bin.* without their index pytorch_model\.bin\.index\.json"
        with pytest.raises(WeightsError, match=missing):
            open_weights(tmp_path)
        with pytest.raises(WeightsError, match="one of several shards; give the folder"):
            open_weights(tmp_path / f"pytorch_model-0000{left}-of-00002.bin")
        (tmp_path / f"pytorch_model-0000{left}-of-00002.bin").rename(tmp_path / f"moved-{left}")
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
