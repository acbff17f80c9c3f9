"""The protocol: openpi's packing is read and written, and everything else is refused."""

import subprocess
import sys

import msgpack
import numpy as np
import pytest

from mvjax.serving.protocol import ProtocolError, decode, encode

DTYPES = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64".split()


def array(**changes):
    fields = {"data": bytes(6), "dtype": "|u1", "shape": [2, 3], "__ndarray__": True, **changes}
    return msgpack.packb({key.encode(): value for key, value in fields.items()})


@pytest.mark.parametrize("dtype", [*DTYPES, ">f4", ">i2"])
def test_arrays_come_back_as_they_were(dtype):
    values = np.random.default_rng(0).integers(0, 2, (2, 3, 4)).astype(dtype)
    for sent in (values, values[:, ::2], values[0, 0, 0], values[:0], np.asarray(values[1, 1, 1])):
        found = decode(encode({"x": sent}))["x"]
        if type(sent) is np.float64:  # a subclass of float
            assert type(found) is float and found == sent
            continue
        assert found.dtype == sent.dtype and found.shape == sent.shape
        np.testing.assert_array_equal(found, sent)


def test_other_values_come_back_as_they_were():
    message = {"prompt": "öffne die Schublade", "reset": True, "n": [1, 2.5, None], "in": {"x": 3}}
    assert decode(encode(message)) == message


def test_what_is_sent_is_what_openpi_sends():
    """The layout of openpi's msgpack_numpy, written out."""
    expected = {
        "image": {
            b"__ndarray__": True,
            b"data": bytes([1, 2]),
            b"dtype": "|u1",
            b"shape": (2,),
        },
        "gripper": {b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"},
    }
    message = {"image": np.array([1, 2], np.uint8), "gripper": np.float32(0.5)}
    assert encode(message) == msgpack.packb(expected)


@pytest.mark.parametrize(
    "message, words",
    [
        (b"", "not a msgpack map"),
        (b"\xc1", "not a msgpack map"),
        (encode({"a": 1}) + b"\x00", "not a msgpack map"),
        (encode({"a": np.zeros(9)})[:-3], "not a msgpack map"),
        (b"\x91" * 5000, "not a msgpack map"),
        (b"\x81\x90\x01", "not a msgpack map"),  # a list as a key
        (b"\xa2\xff\xff", "not a msgpack map"),  # no UTF-8
        (b"\xdd\xff\xff\xff\xff", "not a msgpack map"),  # a list of 4 billion entries
        (b"\xde\xff\xff" + b"\x01\x01" * 65535, "not a msgpack map"),
        (msgpack.packb(msgpack.ExtType(3, b"x")), "extension of type 3"),
        (msgpack.packb([[] for _ in range(4000)]), "more than 128 lists"),
        (msgpack.packb([{} for _ in range(4000)]), "more than 64 maps"),
        (encode([np.float32(0)] * 40), "more than 32 arrays"),
        (bytes(33 * 2**20), "34603008 bytes; at most 33554432"),
        (array(dtype="|O"), "dtype '|O'"),
        (array(dtype="|V6"), "dtype '|V6'"),
        (array(dtype="<c8"), "dtype '<c8'"),
        (array(dtype="<U2"), "dtype '<U2'"),
        (array(dtype="<M8[s]"), "dtype"),
        (array(dtype="i4,i4"), "dtype 'i4,i4'"),
        (array(dtype=["<f4"]), "dtype"),
        (array(dtype=None), "dtype 'None'"),
        (array(shape=[2, 4]), "has 6 bytes, but its shape and dtype (uint8) need 8"),
        (array(shape=[-1]), "not a list of at most 8 sizes"),
        (array(shape=[-2, -3]), "not a list of at most 8 sizes"),
        (array(shape=[2.0, 3]), "not a list of at most 8 sizes"),
        (array(shape=[True, 6]), "not a list of at most 8 sizes"),
        (array(shape=6), "not a list of at most 8 sizes"),
        (array(shape=[1] * 9), "not a list of at most 8 sizes"),
        (array(shape=[2**40, 2**40]), "has 6 bytes"),
        (array(shape=[2**63, 0], data=b""), "a size beyond 2**31"),
        (array(data="abcdef"), "lacks its bytes"),
        (array(data=None), "lacks its bytes"),
        (msgpack.packb({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}), "holds a str"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "not a msgpack"),
        (msgpack.packb({b"__ndarray__": True}), "dtype 'None'"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_what_is_not_of_the_protocol_is_refused(message, words):
    with pytest.raises(ProtocolError) as error:
        decode(message)
    assert words in str(error.value) and len(str(error.value)) < 300


def test_a_costly_message_is_refused_before_it_is_built():
    """Half a million empty lists in a message of half a megabyte."""
    bomb = b"\x9f" + (b"\x9f" + b"\x90" * 15) * 15
    for _ in range(4):
        bomb = b"\x9f" + bomb * 15
    with pytest.raises(ProtocolError, match="more than 128 lists"):
        decode(bomb[: 2**20])


def test_only_plain_numbers_are_sent():
    for value in (np.array(["text"]), np.array([{}]), np.zeros(2, complex), object(), {1, 2}):
        with pytest.raises(TypeError, match="cannot be sent"):
            encode({"value": value})


def test_a_robot_needs_neither_jax_nor_the_rest_of_the_package():
    """The client imports quickly where only numpy, msgpack and websockets are installed."""
    program = (
        "import sys, mvjax.serving.client; "
        "allowed = {'numpy', 'msgpack', 'websockets', 'mvjax', *sys.stdlib_module_names}; "
        "allowed.add('cython_runtime'); "
        "print([m for m in sys.modules if m.split('.')[0] not in allowed and m[0] != '_'])"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "[]"
