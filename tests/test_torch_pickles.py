"""The pickle inside PyTorch's files is never run, and no small file exhausts its reader."""

import pickle
import random
import zipfile

import pytest
from torch_archives import described, rebuild, write_zip
from weight_files import small

from mvjax.weights.files import WeightsError
from mvjax.weights.pt_files import write_pt
from mvjax.weights.source import open_weights


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
