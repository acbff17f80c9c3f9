"""PyTorch's files put together by hand, opcode by opcode."""

import pickle
import zipfile

import numpy as np


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
