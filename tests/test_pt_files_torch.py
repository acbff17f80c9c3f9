"""PyTorch's files against PyTorch itself and against the safetensors library, both ways."""

import io
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from weight_files import every_type

from mvjax.weights.files import WeightsError
from mvjax.weights.pt_files import write_pt
from mvjax.weights.safetensors_files import write_safetensors, write_safetensors_folder
from mvjax.weights.source import open_weights

torch = pytest.importorskip("torch", reason="PyTorch is not installed")


def torch_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def torch_bytes(tensor):
    """Values of a PyTorch tensor, also of types that NumPy lacks."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_equals_torch(found, state):
    assert found.keys() == state.keys()
    for name, theirs in state.items():
        ours = found[name].read()
        assert ours.dtype.name == torch_name(theirs), name
        assert ours.shape == tuple(theirs.shape), name
        assert ours.tobytes() == torch_bytes(theirs), name


def torch_types():
    """A PyTorch tensor of each of our types, scalars and empty ones too."""
    return {
        f"{name}.{shape}": torch.ones(shape).to(getattr(torch, name))
        for name in {one.dtype.name for one in every_type().values()}
        for shape in ((2, 3), (), (0, 4))
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_type_of_torch_save(tmp_path, protocol):
    torch.save(torch_types(), tmp_path / "a.pt", pickle_protocol=protocol)
    assert_equals_torch(open_weights(tmp_path / "a.pt"), torch_types())


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_is_written(tmp_path, mmap):
    write_pt(tmp_path / "a.pt", every_type())
    state = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
    assert type(state) is dict and list(state) == list(every_type())
    assert_equals_torch(every_type(), state)


def test_views_and_shared_storages(tmp_path):
    base = torch.arange(120, dtype=torch.float32).reshape(2, 3, 4, 5)
    state = {
        "base": base,
        "transposed": base.permute(3, 1, 0, 2),
        "row": base[1, 2],
        "steps": base[:, 1:, ::2, 1::2],
        "last": base[1, 2, 3, 4],
        "expanded": base[0, :, :1, 0].expand(3, 4),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
    }
    torch.save(state, tmp_path / "a.pt")
    found = open_weights(tmp_path / "a.pt")
    assert_equals_torch(found, state)
    write_pt(tmp_path / "b.pt", found)
    assert_equals_torch(found, torch.load(tmp_path / "b.pt", weights_only=True))


class _WithState(torch.nn.Module):
    """A module as Transformer Engine's: parameters, a buffer, and a blob beside them."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3, dtype=torch.bfloat16)
        self.norm = torch.nn.BatchNorm1d(3)

    def get_extra_state(self):
        return io.BytesIO(b"recipe")

    def set_extra_state(self, state):
        pass


def test_state_dicts_of_modules(tmp_path):
    model = torch.nn.Sequential(_WithState(), torch.nn.Conv3d(2, 3, (1, 2, 3)))
    state = model.state_dict()
    assert isinstance(state, OrderedDict) and state._metadata  # saved by a BUILD opcode
    assert isinstance(state["0._extra_state"], io.BytesIO)
    torch.save(state, tmp_path / "a.pt")
    tensors = {name: t for name, t in state.items() if torch.is_tensor(t)}
    found = open_weights(tmp_path / "a.pt")
    assert_equals_torch(found, tensors)

    write_pt(tmp_path / "b.pt", found)
    other = torch.nn.Sequential(_WithState(), torch.nn.Conv3d(2, 3, (1, 2, 3)))
    left = other.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True), strict=False)
    assert left.missing_keys == ["0._extra_state"] and not left.unexpected_keys
    assert_equals_torch(found, {n: t for n, t in other.state_dict().items() if n in tensors})


def test_training_checkpoints(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    marked = torch.nn.Parameter(torch.ones(2))
    marked.tensor_parallel = True
    checkpoint = {
        "model": dict(model.named_parameters()) | {"marked": marked},
        "optimizer": optimizer.state_dict(),
        "step": 3,
        "best": np.float32(0.5),
        "note": ("text", b"bytes", bytearray(b"more"), None, 1.5, {1, 2}, 2j),
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "type": torch.bfloat16,
    }
    torch.save(checkpoint, tmp_path / "a.pt")
    parameters = {f"model.{name}": p for name, p in model.named_parameters()}
    states = {
        f"optimizer.state.{i}.{key}": value
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    found = open_weights(tmp_path / "a.pt")
    assert_equals_torch(found, parameters | {"model.marked": marked} | states)


class _Runs:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.flag}",)


class _Restored:
    """Runs code when its state is set."""

    def __init__(self, flag):
        self.flag = flag

    def __setstate__(self, state):
        Path(state["flag"]).touch()


@pytest.mark.parametrize("kind", [_Runs, _Restored])
def test_torch_files_that_would_run_code(tmp_path, kind):
    flag = tmp_path / "ran"
    torch.save({"w": torch.ones(2), "deep": [{"x": kind(flag)}]}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"a\.pt would call \S+(system|_Restored|copyreg\S+);"):
        open_weights(tmp_path / "a.pt")
    assert not flag.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the file is what it is meant to be
    assert flag.exists()


def test_what_torch_saves_that_is_no_plain_tensor(tmp_path):
    for value, message in (
        (torch.nn.Linear(2, 2), r"would call torch\.nn\.modules\.linear\.Linear"),
        ({"w": torch.ones(2).to_sparse()}, r"would call torch\._utils\._rebuild_sparse_tensor"),
        ({"w": torch.ones(2, device="meta")}, r"would call torch\._utils\._rebuild_meta"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj()}, "conjugated or negated view"),
        (torch.ones(2), "holds no tensors by name"),
    ):
        torch.save(value, tmp_path / "a.pt")
        with pytest.raises(WeightsError, match=message):
            open_weights(tmp_path / "a.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"format of PyTorch before 1\.6"):
        open_weights(tmp_path / "a.pt")


def test_files_cut_off(tmp_path):
    torch.save({"w": torch.ones(1000)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for kept in (0.1, 0.5, 0.9, 0.999):
        (tmp_path / "a.pt").write_bytes(whole[: int(len(whole) * kept)])
        with pytest.raises(WeightsError, match=r"is cut off.* download it again"):
            open_weights(tmp_path / "a.pt")


def test_safetensors_library_reads_what_is_written(tmp_path):
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    ours = {name: one for name, one in every_type().items() if one.dtype != np.complex128}
    write_safetensors(tmp_path / "a.safetensors", ours)
    assert_equals_torch(ours, library.load_file(tmp_path / "a.safetensors"))
    with library.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_safetensors_library_writes_what_is_read(tmp_path):
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    state = {n: t for n, t in torch_types().items() if t.dtype != torch.complex128}
    library.save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    assert_equals_torch(open_weights(tmp_path / "a.safetensors"), state)


@pytest.mark.parametrize("max_shard_bytes", [100_000, 5_000_000_000])
def test_transformers_reads_the_folder(tmp_path, max_shard_bytes):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.T5Config(
        vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    )
    model = transformers.T5EncoderModel(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_bytes)
    found = open_weights(tmp_path / "theirs")
    state = model.state_dict()
    assert_equals_torch(found, {name: state[name] for name in found})

    config.save_pretrained(tmp_path / "ours")
    write_safetensors_folder(
        tmp_path / "ours", found, stem="model", max_shard_bytes=max_shard_bytes
    )
    again = transformers.T5EncoderModel.from_pretrained(tmp_path / "ours")
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name]), name
