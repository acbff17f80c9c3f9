"""What `features.json` says of an RLDS dataset: every value of a step, its shape and dtype.

The file names Python classes; they are compared by name only, never imported.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16")
import numpy as np

from data_pipelines.sources.rlds_example import Values
from data_pipelines.sources.rlds_folder import FEATURES

STEPS = "steps"


@dataclass(frozen=True)
class Feature:
    """One value of a step.

    Attributes:
        kind: "number", "text" or "picture" (encoded, such as JPEG).
        dtype: numpy's name of it.
        shape: of one step's value, [h, w, c] for a picture, where -1 is any size.
        encoding: of numbers: "none", or "bytes" and "zlib" for those kept as raw buffers.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str = "none"

    @property
    def is_camera(self) -> bool:
        """Whether it is a colour or grey picture; depth (uint16, float32) is none."""
        if self.dtype != "uint8" or len(self.shape) != 3:
            return False
        return self.kind == "picture" or (self.kind == "number" and self.shape[-1] == 3)

    def numbers(self, values: Values) -> np.ndarray:
        """The steps' values in the dataset's own dtype: [n, *shape].

        `tf.train.Example` has float32 and int64 only, so float64 comes back rounded to float32.
        """
        dtype = np.dtype(self.dtype)
        if self.encoding != "none":
            unpack = zlib.decompress if self.encoding == "zlib" else bytes
            flat = np.frombuffer(b"".join(map(unpack, values.blobs())), dtype)
        else:
            flat = values.numbers()
        # TFDS keeps the bits of a uint64 as an int64, and the value of all others.
        flat = flat.view(dtype) if dtype == np.uint64 else flat.astype(dtype)
        return flat.reshape(-1, *self.shape)


def read_features(folder: Path) -> dict[str, Feature]:
    """The features of a step by their full names, such as "steps/observation/state".

    Values of which a step has any number are left out, and so are sounds, videos and boxes.

    Raises:
        ValueError: if the file is missing or damaged, or the dataset is not made of steps.
    """
    path = folder / FEATURES
    if not path.is_file():
        raise ValueError(f"{path} is missing, which says how to read the records; copy it again")
    try:
        root = json.loads(path.read_text(encoding="utf-8-sig"))
        if "type" in root:
            raise ValueError(
                f"{path} is in the form that TFDS wrote before 2022; rewrite it with a newer TFDS: "
                "tfds.builder_from_directory(folder).info.write_to_directory(folder)"
            )
        steps = root.get("featuresDict", {}).get("features", {}).get(STEPS, {})
        found = _flatten(STEPS, steps.get("sequence", {}).get("feature", {}))
    except (KeyError, TypeError, AttributeError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); copy it again"
        ) from error
    if not found:
        raise ValueError(f"{path} describes no RLDS dataset: its examples are not made of {STEPS}")
    return dict(sorted(found.items()))


def _flatten(name: str, node: dict) -> dict[str, Feature]:
    if "featuresDict" in node:
        members = node["featuresDict"].get("features", {})
        return {
            key: feature
            for child, value in members.items()
            for key, feature in _flatten(f"{name}/{child}", value).items()
        }
    feature = _feature(node)
    return {name: feature} if feature else {}


def _feature(node: dict) -> Feature | None:
    if "text" in node:
        return Feature("text", "object", ())
    if "classLabel" in node:
        return Feature("number", "int64", ())
    if "image" in node:
        return Feature("picture", node["image"].get("dtype", "uint8"), _shape(node["image"]))
    if "tensor" not in node:
        return None
    tensor, shape = node["tensor"], _shape(node["tensor"])
    if tensor["dtype"] in ("object", "string", "str"):
        return None if shape else Feature("text", "object", ())
    if any(size < 1 for size in shape):
        return None
    return Feature("number", np.dtype(tensor["dtype"]).name, shape, tensor.get("encoding", "none"))


def _shape(content: dict) -> tuple[int, ...]:
    return tuple(int(size) for size in content.get("shape", {}).get("dimensions", ()))
