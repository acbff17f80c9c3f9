"""The precisions a network can be computed in.

- "float32": everything, for tests and comparisons.
- "bfloat16": matmuls and the residual stream in bfloat16; time embeddings, rotary tables, norms
  and softmax in float32. For work.
- "published": as "bfloat16", with the roundings of the release besides: video times are rounded
  before their sinusoid, time embeddings and rotary angles are computed in bfloat16. For comparing
  with it.
"""

import jax

Array = jax.Array
PRECISIONS = ("float32", "bfloat16", "published")


def compute_dtype(precision: str) -> str:
    """The dtype of matmuls and the residual stream.

    Raises:
        ValueError: if there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.")
    return "float32" if precision == "float32" else "bfloat16"


def time_dtype(precision: str) -> str:
    """The dtype of the time embedding.

    It is a few rows and reaches every token through every block, so its errors weigh more than its
    cost: in bfloat16 it alone makes a third of the decoder's error (Predict2.5 keeps it float32).
    """
    return "bfloat16" if precision == "published" else "float32"


def rounded(x: Array, precision: str) -> Array:
    """What enters a network from outside: rounded to bfloat16 where the release does."""
    return round_to_bfloat16(x) if precision == "published" else x


def round_to_bfloat16(x: Array) -> Array:
    """Float32 values rounded to those that bfloat16 has.

    A cast to bfloat16 and back may be left out by XLA, which is free to compute more precisely.
    """
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
