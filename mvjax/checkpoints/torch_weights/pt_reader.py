"""Reading what `torch.save` writes since PyTorch 1.6, without PyTorch.

The file is a zip archive whose entries are stored uncompressed: `<root>/data.pkl` describes the
tensors, `<root>/data/<key>` is one storage, the bytes one or more tensors are views of. So a tensor
is memory-mapped straight from its place in the archive. As with PyTorch's own `mmap=True`, the
checksums of the storages are not verified, since that would read every byte twice.
"""

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from mvjax.checkpoints.torch_weights.pt_pickle import StoredTensor, read_pickle
from mvjax.checkpoints.torch_weights.tensors import Tensors, TorchTensor, WeightsError, map_array

# A real checkpoint nests a few dicts; a file made to exhaust the reader would nest without end.
_DEEPEST = 32
_MOST_ENTRIES = 1_000_000

# What `zipfile` raises for broken archives; OSError is a seek to before the file.
_ZIP_DAMAGE = (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error)
_LOCAL_HEADER = 30  # bytes before an entry's name; the data follow the name and the extra field


def read_pt(path: Path) -> Tensors:
    """The tensors of a .pt, .pth or .bin file, named by their dict keys joined with dots.

    Whatever else the file holds (step counts, byte blobs, lists) is left out.

    Raises:
        WeightsError: the file is cut off, damaged, of another kind, or would run code.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise WeightsError(
                f"{path} is cut off: the directory at the end of its zip archive is missing "
                f"({path.stat().st_size / 1e6:,.1f} MB on disk); download it again."
            )
        archive = _Archive.open(path)
    except WeightsError:
        raise
    except _ZIP_DAMAGE as error:
        raise WeightsError(f"{path} is a damaged zip file ({error}); download it again.") from error
    root = read_pickle(archive.description, path)
    if not isinstance(root, dict):
        raise WeightsError(
            f"{path} holds no tensors by name; save a dict of tensors, such as a state_dict()."
        )
    tensors: Tensors = {}
    for count, (name, value) in enumerate(_entries(path, root)):
        if count == _MOST_ENTRIES:
            raise WeightsError(f"{path} holds more than a million entries; it is no checkpoint.")
        if name in tensors:
            raise WeightsError(f"{path} holds two entries called {name}; rename one of them.")
        if isinstance(value, StoredTensor):
            tensors[name] = archive.tensor(name, value)
    return tensors


def _entries(
    path: Path, tree: dict[Any, Any], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Any]]:
    if depth == _DEEPEST:
        raise WeightsError(f"{path} nests dicts more than {_DEEPEST} deep; it is no checkpoint.")
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _entries(path, value, f"{prefix}{key}.", depth + 1)


@dataclass(frozen=True)
class _Archive:
    """Where a PyTorch file keeps its parts.

    Attributes:
        path: the file.
        description: the bytes of `data.pkl`.
        storages: (first byte, size) by key.
    """

    path: Path
    description: bytes
    storages: dict[str, tuple[int, int]]

    @classmethod
    def open(cls, path: Path) -> "_Archive":
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            roots = [name.removesuffix("data.pkl") for name in entries if _is_description(name)]
            if len(roots) != 1:
                raise WeightsError(
                    f"{path} is a zip file, but not one that torch.save wrote: "
                    f"it has {len(roots) or 'no'} data.pkl; save the weights with torch.save."
                )
            (root,) = roots
            if f"{root}constants.pkl" in entries:
                raise WeightsError(
                    f"{path} is a TorchScript program; load it in PyTorch with torch.jit.load and "
                    "torch.save its state_dict()."
                )
            for entry in entries.values():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise WeightsError(
                        f"{path} is compressed ({entry.filename}), but torch.save stores tensors "
                        "plainly; unpack it and pack it again without compression."
                    )
            byteorder = f"{root}byteorder"
            if byteorder in entries and archive.read(byteorder) != b"little":
                raise WeightsError(
                    f"{path} was written on a big-endian machine; load and save it with PyTorch on "
                    "a little-endian one."
                )
            storages = {
                name.removeprefix(f"{root}data/"): (_first_byte(file, entry), entry.file_size)
                for name, entry in entries.items()
                if name.startswith(f"{root}data/")
            }
            return cls(path, archive.read(f"{root}data.pkl"), storages)

    def tensor(self, name: str, stored: StoredTensor) -> TorchTensor:
        """Checks that a tensor lies inside its storage."""
        if stored.storage not in self.storages:
            raise WeightsError(
                f"{self.path} lacks the values of {name} (data/{stored.storage}); download it "
                "again."
            )
        _, dtype, offset, shape, strides = stored
        first, size = self.storages[stored.storage]
        needed = _end(stored) * dtype.itemsize
        if needed > size:
            raise WeightsError(
                f"{self.path} holds {size:,} bytes of values for {name}, which needs {needed:,}; "
                "download it again."
            )
        start = first + offset * dtype.itemsize
        return TorchTensor(
            shape, dtype, partial(map_array, self.path, start, shape, dtype, strides)
        )


def _is_description(name: str) -> bool:
    return name.endswith("/data.pkl") and name.count("/") == 1


def _first_byte(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's data begin; only its own header knows, PyTorch pads it for alignment."""
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile(f"no entry where {entry.filename} should be")
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    first = entry.header_offset + _LOCAL_HEADER + name + extra
    if first + entry.file_size > file.seek(0, 2):
        raise zipfile.BadZipFile(f"{entry.filename} ends after the file")
    return first


def _end(stored: StoredTensor) -> int:
    """One past the last element of the storage that a tensor touches."""
    if 0 in stored.shape:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(stored.shape, stored.strides))
    return stored.offset + last + 1
