"""The features of an RLDS dataset: what features.json says, and the values of a record."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.frames import ImageFrames
from data_pipelines.sources import pictures
from data_pipelines.sources.pictures import ArrayFrames

if TYPE_CHECKING:  # importing TFDS takes 0.3 s, so only opening a dataset does it
    from tensorflow_datasets.features import FeatureConnector
    from tensorflow_datasets.proto import tf_feature_pb2

INFO, FEATURES = "dataset_info.json", "features.json"
STEPS = "steps"


@dataclass(frozen=True)
class Feature:
    """One value of a step."""

    kind: str  # "number", "text", "image" (encoded, such as JPEG), or "" if it is not read
    dtype: str = ""  # NumPy's name
    shape: tuple[int | None, ...] = ()  # of one step; None is any size
    encoding: str = "none"  # of numbers: "none", or "bytes" or "zlib" for raw buffers
    order: str = ""  # of numbers that are pictures: `pictures.axes`
    why: str = ""  # it is not read

    @property
    def is_camera(self) -> bool:
        """Whether it is a colour or grey image, not depth (uint16, float32)."""
        return self.kind == "image" or bool(self.order)


def read_features(
    folder: Path, root: "FeatureConnector"
) -> tuple[dict[str, Feature], dict[str, Feature]]:
    """The features of a step by their full names, "steps/observation/state", and the others."""
    from tensorflow_datasets import features as tfds_features

    found: dict[str, Feature] = {}

    def collect(name: str, node: "FeatureConnector") -> None:
        if type(node) is tfds_features.FeaturesDict:
            for child, value in node.items():
                collect(f"{name}/{child}", value)
        else:
            found[name] = _feature(node)

    if isinstance(root, tfds_features.FeaturesDict) and STEPS in root.keys():
        if isinstance(root[STEPS], tfds_features.Sequence):
            collect(STEPS, root[STEPS].feature)
        for key in root.keys() - {STEPS}:
            collect(key, root[key])
    steps = {key: found[key] for key in sorted(found) if key.startswith(f"{STEPS}/")}
    if not any(feature.kind for feature in steps.values()):
        raise ValueError(
            f"{folder / FEATURES} is not of an RLDS dataset: its examples are not made of {STEPS}"
        )
    return steps, {key: found[key] for key in sorted(found.keys() - steps.keys())}


def _feature(node: "FeatureConnector") -> Feature:
    from tensorflow_datasets import features as tfds_features

    kind = type(node)  # exactly: a box, for example, is a kind of Tensor
    if kind is tfds_features.Image:
        dtype = np.dtype(node.np_dtype).name
        if dtype == "uint8":
            return Feature("image", dtype, node.shape)
        return Feature("", why=f"{dtype} pictures, such as depth; a camera is uint8")
    if kind is tfds_features.ClassLabel:
        return Feature("number", "int64", ())
    if kind in (tfds_features.Text, tfds_features.Tensor, tfds_features.Scalar):
        if node.np_dtype == np.object_:
            if node.shape:
                return Feature("", why="several texts in each step")
            return Feature("text", "object", ())
        if not all(node.shape):
            return Feature("", why=f"values of shape {list(node.shape)}, whose size may vary")
        dtype, shape = np.dtype(node.np_dtype), tuple(node.shape)
        order = ""
        if dtype == np.uint8:
            try:
                order = pictures.axes(dtype, (1, *shape))
            except ValueError as error:
                return Feature("", why=str(error))
        encoding = node.to_json_content().encoding
        return Feature("number", dtype.name, shape, encoding, order)
    return Feature("", why=f"a feature of the kind {kind.__name__}, which is not read")


def read_values(
    feature: Feature, key: str, stored: Mapping[str, "tf_feature_pb2.Feature"], where: str
) -> Sequence:
    """The values of a feature in a record: an array [n, *shape], texts as bytes, or frames."""
    if not feature.kind:
        raise ValueError(feature.why)
    kind = stored[key].WhichOneof("kind") if key in stored else None
    if kind is None:
        raise ValueError(f"the record has no {key!r}, which {FEATURES} lists")
    values = getattr(stored[key], kind).value
    if (kind == "bytes_list") != (feature.kind != "number" or feature.encoding != "none"):
        raise ValueError(f"{FEATURES} says {feature}, but it is stored as {kind}")
    if feature.kind == "text":
        return values
    if feature.kind == "image":
        if empty := sum(not image for image in values):
            raise ValueError(f"{empty} of its {len(values)} pictures are empty")
        return EncodedFrames(f"{where}: {key}", values)
    dtype = np.dtype(feature.dtype)
    if kind == "bytes_list":
        unpack = zlib.decompress if feature.encoding == "zlib" else bytes
        flat = np.frombuffer(bytearray().join(map(unpack, values)), dtype)
    else:
        flat = np.array(values, np.float32 if kind == "float_list" else np.int64)
        # TFDS stores a uint64 as the int64 with the same bits, all other integers by value, and a
        # float64 rounded to float32.
        flat = flat.view(dtype) if dtype == np.uint64 else flat.astype(dtype)
    size = math.prod(feature.shape)
    if len(flat) % size:
        raise ValueError(
            f"{FEATURES} says {list(feature.shape)}, but there are {len(flat)} numbers, which is "
            f"no multiple of {size}"
        )
    array = flat.reshape(-1, *feature.shape)
    return ArrayFrames(f"{where}: {key}", array, feature.order) if feature.order else array


class EncodedFrames(ImageFrames):
    """Frames that are stored as JPEG, PNG or other images inside a record."""

    def __init__(self, where: str, images: Sequence[bytes]):
        super().__init__(where, len(images))
        self._images = images

    def __reduce__(self):  # a list inside a protobuf cannot be pickled
        return EncodedFrames, (self.where, list(self._images))

    def encoded(self, number: int) -> bytes:
        """One image as it is stored."""
        return self._images[number]
