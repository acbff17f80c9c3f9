"""Latent pictures cut into the 2×2 patches that are the video DiT's tokens, and put together again.

The two orders inside a token differ, as published: one is not the inverse of the other.
"""

import jax

from mvjax.clip import PATCH

Array = jax.Array


def patchify(x: Array) -> Array:
    """[b, t, h, w, c] to [b, t·h/2·w/2, 4 c]; within a token the channel is slowest."""
    b, t, h, w, c = x.shape
    if h % PATCH or w % PATCH:
        raise ValueError(
            f"Latents of {h}x{w} cannot be cut into 2x2 patches; use pictures whose height and "
            "width are multiples of 16 pixels."
        )
    x = x.reshape(b, t, h // PATCH, PATCH, w // PATCH, PATCH, c)
    return x.transpose(0, 1, 2, 4, 6, 3, 5).reshape(b, -1, PATCH**2 * c)


def unpatchify(x: Array, shape: tuple[int, ...]) -> Array:
    """[b, tokens, 4 c] to [b, t, h, w, c]; within a token the channel is fastest (as published)."""
    b, t, h, w, c = shape
    x = x.reshape(b, t, h // PATCH, w // PATCH, PATCH, PATCH, c)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, t, h, w, c)
