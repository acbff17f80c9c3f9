"""The T5 encoder (Raffel et al., arXiv 1910.10683), which reads the prompts of Cosmos-Predict2."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mvjax.models.layers import Linear, RMSNorm, stack
from mvjax.models.precision import compute_dtype
from mvjax.parallel.rules import constrain

Array = jax.Array


@dataclass(frozen=True)
class T5EncoderConfig:
    """Sizes of a T5 encoder; the defaults are `google-t5/t5-11b`.

    `precision` is "float32", "bfloat16" (matrix products in bfloat16, residual stream, norms and
    softmax in float32), or "published": everything in float32 and the result rounded to bfloat16,
    as the release does unless told `--downcast_text_encoder`.
    """

    vocab_size: int = 32128
    width: int = 1024
    num_blocks: int = 24
    num_heads: int = 128
    head_dim: int = 128
    mlp_dim: int = 65536
    relative_buckets: int = 32
    max_distance: int = 128
    precision: str = "float32"

    def __post_init__(self):
        compute_dtype(self.precision)
        if self.relative_buckets % 4 or self.max_distance <= self.relative_buckets // 4:
            raise ValueError(
                f"The T5 encoder's relative_buckets {self.relative_buckets} must be a multiple of "
                f"4, and max_distance {self.max_distance} more than a quarter of it."
            )


class Block(nnx.Module):
    """Self-attention over the tokens of a text, then a ReLU MLP; both pre-normed, no biases."""

    def __init__(self, key: Array, config: T5EncoderConfig):
        keys = jax.random.split(key, 6)
        d, inner, mlp = config.width, config.num_heads * config.head_dim, config.mlp_dim
        self.num_heads = config.num_heads
        self.attn_norm = RMSNorm(d)
        self.q_proj = Linear(keys[0], d, inner, ("embed", "heads"))
        self.k_proj = Linear(keys[1], d, inner, ("embed", "heads"))
        self.v_proj = Linear(keys[2], d, inner, ("embed", "heads"))
        self.output_proj = Linear(keys[3], inner, d, ("heads", "embed"))
        self.mlp_norm = RMSNorm(d)
        self.layer1 = Linear(keys[4], d, mlp, ("embed", "mlp"))
        self.layer2 = Linear(keys[5], mlp, d, ("mlp", "embed"))

    def __call__(self, x: Array, bias: Array, mask: Array, dtype) -> Array:
        """One block on the float32 residual stream x [b, l, d]; products are taken in `dtype`.

        Args:
            x: residual stream.
            bias: added to the attention logits, float32 [1, heads, l, l].
            mask: which keys may be attended to, bool [b, 1, 1, l].
            dtype: of the inputs of the matrix products.
        """
        h = self.attn_norm(x).astype(dtype)
        q, k, v = (self._heads(proj(h)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        # T5 folds 1/√head_dim into the initialisation of the queries, hence scale=1.
        y = jax.nn.dot_product_attention(
            constrain(q, "batch", "length", "heads", None),
            constrain(k, "batch", None, "heads", None),
            constrain(v, "batch", None, "heads", None),
            bias,
            mask,
            scale=1.0,
            implementation="xla",
        )
        x = x + self.output_proj(y.reshape(*y.shape[:2], -1))
        h = self.mlp_norm(x).astype(dtype)
        x = x + self.layer2(jax.nn.relu(self.layer1(h)))
        return constrain(x, "batch", "length", None)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class T5Encoder(nnx.Module):
    """Tokens of a text to one vector per token; positions enter as relative attention biases.

    The published layout keeps the table of biases in block 0; all blocks share it, so it lives
    beside them here. The network is only ever loaded, never trained: the initialisation has
    sensible sizes and no more.
    """

    def __init__(self, config: T5EncoderConfig, key: Array):
        keys = jax.random.split(key, 3)
        self.config = config
        embedding = jax.random.normal(keys[0], (config.vocab_size, config.width))
        self.token_embedding = nnx.Param(embedding, axes=(None, "embed"))
        bias = jax.random.normal(keys[1], (config.relative_buckets, config.num_heads))
        self.relative_bias = nnx.Param(bias, axes=(None, "heads"))
        self.blocks = stack(lambda k: Block(k, config), keys[2], config.num_blocks)
        self.final_norm = RMSNorm(config.width)

    def __call__(self, tokens: Array, mask: Array) -> Array:
        """Embeds texts.

        Args:
            tokens: token ids, int32 [b, l].
            mask: true (1) for tokens, false (0) for padding, [b, l].

        Returns:
            The last hidden state [b, l, width], zeros where the text is padding (as the release
            does); float32, or bfloat16 for the precisions "bfloat16" and "published".
        """
        config, mask = self.config, mask.astype(bool)
        dtype = jnp.bfloat16 if config.precision == "bfloat16" else jnp.float32
        # Accelerators multiply float32 with fewer bits unless told otherwise; PyTorch does not.
        with jax.default_matmul_precision("default" if dtype == jnp.bfloat16 else "highest"):
            x = self._run(tokens, mask, dtype)
        out = jnp.float32 if config.precision == "float32" else jnp.bfloat16
        return jnp.where(mask[..., None], x, 0).astype(out)

    def _run(self, tokens: Array, mask: Array, dtype) -> Array:
        config, length = self.config, tokens.shape[1]
        x = self.token_embedding[...][tokens].astype(jnp.float32)
        x = constrain(x, "batch", "length", None)
        bucket = position_bucket(length, config.relative_buckets, config.max_distance)
        bias = self.relative_bias[...].astype(jnp.float32)[bucket].transpose(2, 0, 1)[None]
        bias = constrain(bias, None, "heads", "length", None)
        step = lambda x, block: (block(x, bias, mask[:, None, None], dtype), None)  # noqa: E731
        return self.final_norm(jax.lax.scan(step, x, self.blocks)[0])


def position_bucket(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Which entry of the bias table a query and a key use, int [queries, keys].

    Half of the buckets are for keys after the query, half for the others. In each half, the first
    half are the exact distances, the rest grow logarithmically up to `max_distance`; everything
    beyond shares the last (T5's `relative_position_bucket`, bidirectional).
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    half, exact, distance = buckets // 2, buckets // 4, np.abs(offset)
    ratio = np.log(np.maximum(distance, exact) / exact) / np.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (half - exact)).astype(int), half - 1)
    return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)
