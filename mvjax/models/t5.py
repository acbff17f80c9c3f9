"""T5 (Raffel et al., arXiv 1910.10683), which reads the prompts of Cosmos-Predict2.

In this order: the encoder network; the tokenizer, read from a local file; `T5TextEncoder`, which
makes prompts the text embeddings that the video DiT was trained with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mvjax.models.attention import heads
from mvjax.models.layers import Linear, RMSNorm, compute_dtype, stack
from mvjax.models.network import Network, Params
from mvjax.parallel import constrain

Array = jax.Array

PAD, EOS = 0, 1  # of every T5
FILES = ("tokenizer.json", "spiece.model")  # the first is what the release reads
BATCH = 8  # texts per pass; the attention logits of 8 x 512 tokens of t5-11b take 1 GiB
SHORTEST = 64  # tokens per pass at least; an instruction to a robot has 10 to 20


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
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (heads(project(h), self.num_heads) for project in projections)
        # Not `attend`: the fused kernels take no bias, and a text is short.
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
        chex.assert_rank(tokens, 2)
        chex.assert_equal_shape([tokens, mask])
        config, mask = self.config, mask.astype(bool)
        dtype = jnp.bfloat16 if config.precision == "bfloat16" else jnp.float32
        # Accelerators multiply float32 with fewer bits unless told otherwise; PyTorch does not.
        with jax.default_matmul_precision("default" if dtype == jnp.bfloat16 else "highest"):
            x = self._run(tokens, mask, dtype)
        out = jnp.float32 if config.precision == "float32" else jnp.bfloat16
        return jnp.where(mask[..., None], x, 0).astype(out)

    def _run(self, tokens: Array, mask: Array, dtype) -> Array:
        config, length = self.config, tokens.shape[1]
        # Float32 in every precision: T5's residual stream grows so large that bfloat16 would lose
        # what a sublayer adds to it.
        x = self.token_embedding[...][tokens].astype(jnp.float32)
        x = constrain(x, "batch", "length", None)
        # One table of biases serves all blocks: gathered once, outside the scan.
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


@dataclass(frozen=True)
class T5Tokenizer:
    """Texts to ids; `load_t5_tokenizer` makes one from a file.

    Attributes:
        pieces: ids of a text, without end mark.
        vocab_size: ids are below this.
        length: tokens per text; longer texts are cut, the end mark stays last.
    """

    pieces: Callable[[str], list[int]]
    vocab_size: int
    length: int

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [n, length], and which of them are tokens, bool [n, length].

        Every text ends with the end mark (EOS); the rest is padding. An empty text is one token.
        """
        tokens = np.full((len(texts), self.length), PAD, np.int32)
        used = np.zeros(tokens.shape, bool)
        for row, mask, text in zip(tokens, used, texts):
            ids = [*self.pieces(text)[: self.length - 1], EOS]
            row[: len(ids)] = ids
            mask[: len(ids)] = True
        return tokens, used


def load_t5_tokenizer(path: str | Path, length: int = 512) -> T5Tokenizer:
    """Reads a T5 tokenizer.

    Args:
        path: a folder in Hugging Face layout with `tokenizer.json` or `spiece.model` (the first is
            taken where both are there), or such a file under any name.
        length: tokens per text, end mark included; 512 as published.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package that reads this kind of file is not installed.
        ValueError: the file is not a T5 tokenizer, or the length is not positive.
    """
    if length < 1:
        raise ValueError(f"A text needs a length of 1 token or more (its end mark), got {length}.")
    file = _tokenizer_file(Path(path))
    with file.open("rb") as stream:
        is_json = stream.read(1) == b"{"
    pieces, vocab_size, marks = (_from_json if is_json else _from_sentencepiece)(file)
    if marks != (PAD, EOS):
        raise ValueError(
            f"{file} has the padding and end marks {marks} where T5 has {(PAD, EOS)}; use the "
            "tokenizer that belongs to the T5 weights."
        )
    return T5Tokenizer(pieces, vocab_size, length)


def _tokenizer_file(path: Path) -> Path:
    for file in (path, *(path / name for name in FILES)):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"There is no tokenizer at {path}; give a folder that holds {FILES[0]} or {FILES[1]} "
        "(as google-t5/t5-11b does), or one of these files."
    )


def _from_json(file: Path):
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"Reading {file} needs a package: pip install tokenizers.") from error
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{file} is not a tokenizer.json of Hugging Face: {error}") from error
    # The file's own settings of length and padding are for other uses; the caller's hold here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    marks = tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>")
    pieces = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    return pieces, tokenizer.get_vocab_size(), marks


def _from_sentencepiece(file: Path):
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError(f"Reading {file} needs a package: pip install sentencepiece.") from error
    try:
        processor = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{file} is neither a tokenizer.json nor a sentencepiece model: {error}"
        ) from error
    return processor.encode, processor.vocab_size(), (processor.pad_id(), processor.eos_id())


class T5TextEncoder:
    """Embeds texts with a T5 encoder. Same interface as `NgramTextEncoder`.

    A pass is as long as its longest text, rounded up to a power of two (64, 128, ..., length), not
    the published 512 always: padding is masked, so the numbers are the same up to rounding, and
    an instruction costs an eighth. A batch always has 8 rows. So there are a few compilations
    (four for 512), whatever the texts.

    Args:
        network: a `T5Encoder` without weights.
        params: its parameters, on the device, in float32 or bfloat16; sharded or not.
        tokenizer: from `load_t5_tokenizer`; its length becomes the length here.

    Raises:
        ValueError: the tokenizer has more ids than the network has embeddings.
    """

    def __init__(self, network: Network, params: Params, tokenizer: T5Tokenizer):
        if tokenizer.vocab_size > network.config.vocab_size:
            raise ValueError(
                f"The tokenizer has {tokenizer.vocab_size} ids, but the T5 encoder has embeddings "
                f"for {network.config.vocab_size}; use the tokenizer that belongs to the weights."
            )
        self.length, self.dim = tokenizer.length, network.config.width
        self._params, self._tokenizer = params, tokenizer
        # Parameters are arguments: closed over, they would be constants of every compiled length.
        self._forward = jax.jit(lambda params, *inputs: network.bind(params)(*inputs))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts: float32 [n, length, dim], zeros past a text's end."""
        out = np.zeros((len(texts), self.length, self.dim), np.float32)
        for start in range(0, len(texts), BATCH):
            rows = out[start : start + BATCH]
            tokens, mask = self._tokenizer(texts[start : start + BATCH])
            length = self._padded_length(mask.sum(axis=1).max())
            # A batch that is not full is filled with rows without tokens, so that shapes repeat.
            fill = ((0, BATCH - len(rows)), (0, 0))
            inputs = (np.pad(x[:, :length], fill) for x in (tokens, mask))
            rows[:, :length] = np.asarray(self._forward(self._params, *inputs))[: len(rows)]
        return out

    def _padded_length(self, longest: int) -> int:
        return min(self.length, max(SHORTEST, 1 << (int(longest) - 1).bit_length()))
