"""The rotary table: position embedding over (time, height, width), and its use."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def rope_table(
    grid_thw: tuple[int, int, int],
    head_dim: int,
    ratio_thw: tuple[float, float, float],
    dtype: str = "float32",
) -> tuple[Array, Array]:
    """Cosines and sines for every token of a (t, h, w) grid, tokens in row-major order.

    A head's channels are divided into a time part and equal height and width parts
    (head_dim // 6 · 2 each); each axis stretches its base frequency by ratio^(d / (d - 2)) so that
    a larger grid stays inside the range seen in training (NTK scaling). Positions are plain
    indices: no frame-rate scaling. Source: Cosmos-Predict2, `VideoRopePosition3DEmb`.

    Args:
        grid_thw: latent frames, patch rows, patch columns.
        head_dim: channels of one head; 12 or more, even.
        ratio_thw: extrapolation ratios.
        dtype: what angles are computed in, every step rounded; "bfloat16" as in the release, whose
            buffers were cast with the network (angles are off by up to 0.1 there).

    Returns:
        cos, sin: float32 [t·h·w, head_dim / 2].
    """
    # With NumPy, in `dtype` at every step: the release's roundings happen here, not on a device.
    d_space = head_dim // 6 * 2
    sizes = (head_dim - 2 * d_space, d_space, d_space)
    angles = []
    for axis, (length, size, ratio) in enumerate(zip(grid_thw, sizes, ratio_thw)):
        theta = np.asarray(10000.0 * ratio ** (size / (size - 2)), dtype)
        frequencies = np.ones((), dtype) / theta ** (np.arange(0, size, 2) / size).astype(dtype)
        angle = np.arange(length).astype(dtype)[:, None] * frequencies
        shape = [1, 1, 1, size // 2]
        shape[axis] = length
        angle = angle.astype(np.float32).reshape(shape)
        angles.append(jnp.broadcast_to(angle, (*grid_thw, size // 2)))
    angle = jnp.concatenate(angles, axis=-1).reshape(-1, head_dim // 2)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_blhd: Array, cos_lf: Array, sin_lf: Array) -> Array:
    """Rotates channel pairs (i, i + head_dim / 2) of [b, l, heads, head_dim] in float32."""
    first, second = jnp.split(x_blhd.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_lf[:, None, :], sin_lf[:, None, :]
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x_blhd.dtype)
