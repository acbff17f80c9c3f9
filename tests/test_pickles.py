"""Pickles of arrays and of PyTorch's files are never run, and no small one exhausts its reader."""

import pickle
import random
import zipfile

import numpy as np
import pytest
from torch_archives import described, rebuild, write_zip
from weight_files import small

from data_pipelines.pickles import PickleRefused, read_array_pickle
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
        (b"X\1\0\0\0a(K\1tR", "not callable"),
        (b"ctorch\nFloatStorage\n(K\1tR", "not callable"),
        (b"ctorch\nfloat32\n(K\1tR", "not callable"),
        (b"\x82\x01", "EXT1"),
        (b"(K\1o", "OBJ"),
        (b"ctorch._utils\n_rebuild_tensor\n)R", "not enough values"),
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
        (b"}r\xff\xff\xff\x7f", "2147483647 of its memo"),  # a memo of two thousand million places
        (b"}q\1X\1\0\0\0ah\1s", "more than 32 deep"),  # a dict that holds itself
        # A dict that doubles thirty times, and a key that takes 2**60 steps to hash.
        (b"}" + b"q\0010}(X\1\0\0\0ah\1X\1\0\0\0bh\1u" * 30, "more than a million entries"),
        (b"}(K\1" + b"q\1h\1\x86" * 60 + b"K\1u", "as a key"),
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


_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tC\1btR"
_F4 = b"cnumpy\ndtype\n(X\2\0\0\0f4tR"
_STATE = b"(K\1(K\1t" + _F4 + b"\x89C\4\0\0\x80\x3ftb"  # one float, 1.0


def test_an_array_put_together_by_hand():
    np.testing.assert_array_equal(read_array_pickle(_ARRAY + _STATE + b".", "a"), np.ones(1))


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"cposix\nsystem\n(X\1\0\0\0atR", r"a would call posix\.system; only NumPy"),
        (b"c__builtin__\neval\n(X\1\0\0\x001tR", r"would call builtins\.eval"),
        (b"cnumpy\nndarray.__setstate__\n", r"would call numpy\.ndarray\.__setstate__"),
        (b"\x8c\5numpy\x8c\x10core.os.system.a\x93", r"would call numpy\.core\.os\.system"),
        (b"inumpy\nload\n", "MARK|mark"),
        (b"(inumpy\nload\n", r"would call numpy\.load"),
        # Called with what would be harmful if the function were the real one.
        (b"c__builtin__\nbytes\n(J\xff\xff\xff\x7ftR", "positional argument"),
        (b"c_codecs\nencode\n(X\1\0\0\0aX\5\0\0\0idna1tR", "'idna1'"),
        (b"cnumpy\ndtype\n(X\2\0\0\0O8tR", "type 'O8'"),
        (b"cnumpy\ndtype\n(]tR", "only numbers"),
        (b"cnumpy\ndtype\n)R", "missing 1 required"),
        (b"cnumpy\nndarray\n(I1000000000000\ntR", "not callable"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(" + _F4 + b"tR", "another class"),
        # The array's parts do not belong together, or are no parts of an array.
        (_ARRAY + b"(K\1(K\2t" + _F4 + b"\x89C\4abcdtb", r"4 bytes for an array"),
        (_ARRAY + b"(K\1(J\xff\xff\xff\xfft" + _F4 + b"\x89C\0tb", "has the shape"),
        (_ARRAY + b"(K\1(I1000000000\nX\2\0\0\0abt" + _F4 + b"\x89C\0tb", "has the shape"),
        (_ARRAY + _STATE + _STATE, "invalid"),
        (_ARRAY + b"}X\1\0\0\0aK\1sb", "invalid"),
        (_ARRAY, "other than arrays"),
        (_F4, "other than arrays"),
        (b"\x8f(K\1\x90", "other than arrays"),
        # Opcodes that reach past the table or the file.
        *((code + b"\1\0\0\0", "opcode EXT") for code in (b"\x82", b"\x83", b"\x84")),
        (b"N2", "opcode DUP"),
        (b"\x97", "opcode NEXT_BUFFER"),
        (b"Px\n", "opcode PERSID"),
        (b"NQ", "persistent ids"),
        # Small pickles that would take all memory, all time, or the stack of C.
        (b"\x8e" + b"\xff" * 6 + b"\0\0", "expected 281474976710655 bytes"),
        (b"\x96" + b"\xff" * 6 + b"\0\0", "expected 281474976710655 bytes"),
        (b"\x95" + b"\xff" * 7 + b"\x3fN", "truncated|exceeds"),
        (b"Nr\xff\xff\xff\x7f", "entry 2147483647 of its memo"),
        (b"Np2147483647\n", "entry 2147483647 of its memo"),
        (b"}(K\1" + b"q\1h\1\x86" * 60 + b"K\1u", "as a key"),
        (b"}N" + b"\x85" * 300_000 + b"K\1s", "as a key"),
        (b"\x8f(N" + b"\x85" * 300_000 + b"\x90", "other than arrays"),
        (b"N" + b"\x85" * 300_000, "recursion"),
        (b"]q\0h\0a", "recursion"),
    ],
)
def test_array_pickles_that_hold_anything_else_are_refused(opcodes, message):
    with pytest.raises(PickleRefused, match=message):
        read_array_pickle(opcodes + b".", "a")


def test_what_a_name_stands_for_cannot_be_changed_by_a_pickle():
    poison = _F4 + b"0cnumpy\ndtype\n(N}X\5\0\0\0_callNstb0cnumpy\nndarray\n}X\5\0\0\0valueNsb0"
    for _ in range(2):
        found = read_array_pickle(poison + _ARRAY + _STATE + b".", "a")
        np.testing.assert_array_equal(found, np.ones(1))


def test_mutated_pickles_are_read_or_refused():
    rng = random.Random(0)
    value = [{"a": np.arange(6.0).reshape(2, 3), "b": (np.float32(1), b"x", "y", None)}]
    good = [pickle.dumps(value, protocol) for protocol in range(1, 6)]
    parts = [_ARRAY, _STATE, _F4, b"}", b"(", b"t", b"u", b"s", b"b", b"R", b"\x81", b"h\1", b"q\1"]
    for _ in range(2000):
        bad = bytearray(rng.choice(good))
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(bad))
            if rng.random() < 0.5:
                bad[at] = rng.randrange(256)
            else:
                bad[at:at] = rng.choice(parts)
        try:
            read_array_pickle(bytes(bad), "a")
        except PickleRefused:
            pass
