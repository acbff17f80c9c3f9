"""The RLDS datasets that TFDS wrote (fixtures/make_rlds.py), what it reads of them, and damage."""

import hashlib
import json
import shutil
from pathlib import Path

import google_crc32c
import numpy as np

from data_pipelines.sources.formats import open_dataset
from data_pipelines.sources.rlds import read_index, read_record

FIXTURES = Path(__file__).parent / "fixtures/rlds"
ARM, ARM_ARRAY, CELL = (FIXTURES / n for n in ("arm/1.0.0", "arm_array/1.0.0", "cell/0.1.0"))
COUNTS = {"train": 4, "val": 2}
LEFT_OUT = {"steps/observation/depth", "steps/observation/ragged"}


def open_rlds(path: Path, fps: float = 5.0, **options):
    return open_dataset("rlds", path, "robots", "arm", {"fps": fps, **options})


def truth(name: str, split: str, number: int) -> dict[str, np.ndarray]:
    """What TFDS reads of one episode, by the names of the streams."""
    head = f"{split}/{number}/"
    with np.load(FIXTURES / f"{name}.npz") as file:
        return {f"steps/{k[len(head) :]}": file[k] for k in file.files if k.startswith(head)}


def digest(data: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(data).digest(), np.uint8)


def check_episode(episode, expected: dict[str, np.ndarray]) -> None:
    """Every stream is what TFDS reads, and no value of a step is lost."""
    expected.pop("steps/file_path")
    language = {key for key in expected if "language" in key}
    assert set(episode.streams) == expected.keys() - language - LEFT_OUT
    for key, stream in episode.streams.items():
        if hasattr(stream.values, "encoded"):
            found = np.stack([digest(stream.values.encoded(i)) for i in range(len(stream.values))])
        elif isinstance(stream.values, np.ndarray):
            found = stream.values
        else:
            found = stream.values.read(range(len(stream.values)))
        np.testing.assert_array_equal(found, expected[key], err_msg=key, strict=True)


def copy(source: Path, tmp_path: Path, **info) -> Path:
    """A copy to damage; `info` replaces entries of dataset_info.json."""
    target = tmp_path / "copy/1.0.0"
    shutil.copytree(source, target)
    file = target / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | info))
    return target


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shards(folder: Path, split: str = "train") -> list[Path]:
    return sorted(folder.glob(f"*-{split}.*-of-*"))


def readable(episodes) -> tuple[list[int], list[str]]:
    good, reasons = [], []
    for i in range(len(episodes)):
        try:
            good.append(i if episodes[i].id else -1)
        except ValueError as error:
            reasons.append(str(error))
    return good, reasons


def rewrite(path: Path, change) -> None:
    """Change every payload of a TFRecord file, with right checksums."""

    def masked(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return ((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")

    index = read_index(path)
    payloads = [change(read_record(path, index, i)) for i in range(len(index[0]))]
    sizes = [len(payload).to_bytes(8, "little") for payload in payloads]
    path.write_bytes(b"".join(s + masked(s) + p + masked(p) for s, p in zip(sizes, payloads)))
