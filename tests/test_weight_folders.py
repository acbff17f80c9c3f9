"""Folders of weights as Hugging Face lays them out."""

import json

import numpy as np
import pytest
from weight_files import assert_same, small, tensor

from mvjax.weights.files import WeightsError
from mvjax.weights.pt_files import write_pt
from mvjax.weights.safetensors_files import write_safetensors, write_safetensors_folder
from mvjax.weights.source import open_weights


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
