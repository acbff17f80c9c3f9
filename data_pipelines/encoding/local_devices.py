"""A tokenizer on all accelerators of this process, each of which encodes a part of every batch."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_VALUES = 1 << 24  # of video per call and device: 64 small clips, or one of 61 frames at 480x640
_WINDOWS = 64


class LocalTokenizer:
    """A `VideoTokenizer`; the other processes of a run have theirs."""

    def __init__(self, tokenizer: Any):
        """Copies the tokenizer, a pytree with a jitted `encode`, to every device."""
        mesh = Mesh(np.array(jax.local_devices()), ("batch",))
        self._tokenizer = jax.device_put(tokenizer, NamedSharding(mesh, PartitionSpec()))
        self._split = NamedSharding(mesh, PartitionSpec("batch"))

    def encode(self, video: np.ndarray) -> jax.Array:
        """Latents of video [b, t, h, w, 3]; b is a multiple of the devices."""
        return self._tokenizer.encode(jax.device_put(video, self._split))


def local_batch_size(frames: int, height: int, width: int) -> int:
    """Windows per call: what fills the devices without filling their memory."""
    each = max(1, min(_WINDOWS, _VALUES // (frames * height * width * 3)))
    return each * jax.local_device_count()
