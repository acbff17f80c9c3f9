"""Attention, without a mask: which kernel computes it, how the kernel is sharded, and the module.

In this order: `attend`, for queries, keys and values that are ready; `on_shards`, a kernel's
sharding; the kernels and the choice among them; the module `Attention`.

What attends may be several streams of tokens, such as a video and the views beside it: each keeps
its own sharding, and the queries of each read the keys of all, or of those that are named
(`Reads`), which takes the place of a mask. A single one is a stream, too.

"xla" writes the logits of every query and key to memory; "cudnn" (NVIDIA GPUs) and "splash" (TPUs,
`mvjax.models.splash`) keep them on the chip, which is what makes tens of thousands of tokens
possible.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from mvjax.models.layers import ATTENTION, PROJECTED, Linear, RMSNorm, keep, linears
from mvjax.models.lora import LoRA
from mvjax.models.norm_rope import rotation_tables
from mvjax.models.rope import rotate
from mvjax.models.splash import can_project, splash_length_first, splash_projected
from mvjax.parallel import (
    activation_spec,
    constrain,
    join_shards,
    joined,
    platform,
    shard_shape,
)

Array = jax.Array
Kernel = Callable[[Array, Array, Array], Array]  # q, k, v [b, length, heads, head_dim]
KeysValues = tuple[Array, Array]
Streams = Sequence[Array]  # of the same samples and width, each of its own length
Rope = tuple[Array, Array]  # cosines and sines of `rope_table`
# The streams of keys that the queries of each stream read, by number, in parts: a part's keys are
# joined for a kernel with blocks that fit their length.
Reads = Sequence[Sequence[Sequence[int]]]

KERNELS = ("auto", "xla", "cudnn", "splash")

# Logits of a head up to this number stay with XLA: the decoder's few tokens, toy videos.
FEW_LOGITS = 2**20
SHORT = 512  # keys that are cheaper to make everywhere than to gather
CUDNN_HEAD_DIM = 128  # its largest


def attend(
    q_blhd: Array, k_bmhd: Array, v_bmhd: Array, kernel: str = "auto", name: str | None = None
) -> Array:
    """softmax(q kᵀ / √d) v for every head, without mask.

    Under a mesh the query sequence is sharded over `context` and keys and values are gathered,
    so full attention needs no other communication.

    Args:
        q_blhd: queries [batch, queries, heads, head_dim].
        k_bmhd, v_bmhd: keys and values [batch, keys, heads, head_dim].
        kernel: see `choose_kernel`.
        name: by which a rematerialisation policy may keep what the backward pass needs.

    Returns:
        [batch, queries, heads, head_dim] in the dtype of the queries.
    """
    return attend_streams([q_blhd], [k_bmhd], [v_bmhd], kernel, name)[0]


def reads_all(queries: Streams, keys: Streams) -> Reads:
    """Every stream reads all: the first, which is long, and all others as a part of their own."""
    others = range(1, len(keys))
    return [[[0], others] if others else [[0]]] * len(queries)


def attend_streams(
    q_blhd: Streams,
    k_bmhd: Streams,
    v_bmhd: Streams,
    kernel: str = "auto",
    name: str | None = None,
    reads: Reads | None = None,
) -> list[Array]:
    """As `attend`, of the queries of every stream to the keys of the streams that it reads.

    Without `reads` it reads all.
    """
    b, _, num_heads, head_dim = q_blhd[0].shape
    # Fewer heads of keys than of queries would be shared between them, and not refused.
    for k, v in zip(k_bmhd, v_bmhd):
        chex.assert_shape([k, v], (b, k.shape[1], num_heads, head_dim))
    kernel = choose_kernel(kernel, q_blhd[0], sum(k.shape[1] for k in k_bmhd))
    reads = reads or reads_all(q_blhd, k_bmhd)
    if kernel == "xla":
        k, v = ([constrain(x, "batch", None, "heads", None) for x in xs] for xs in (k_bmhd, v_bmhd))
        k, v = (
            _of_each(reads, lambda read, xs=xs: joined([xs[i] for i in read], 1)) for xs in (k, v)
        )
        q = [constrain(x, "batch", "length", "heads", None) for x in q_blhd]
        return [xla(*qkv, name) for qkv in zip(q, k, v)]
    on_device = functools.partial(
        {"cudnn": cudnn, "splash": splash_length_first}[kernel], name=name
    )
    return on_shards(on_device, q_blhd, k_bmhd, v_bmhd, reads)


def _of_each(reads: Reads, make: Callable[[tuple[int, ...]], Array]) -> Iterator[Array]:
    """What `make` makes of the streams that each reads, once for those that read the same."""
    made: dict[tuple[int, ...], Array] = {}
    for parts in reads:
        read = tuple(chain.from_iterable(parts))
        if read not in made:
            made[read] = make(read)
        yield made[read]


def on_shards(
    kernel: Kernel,
    q_blhd: Streams,
    k_bmhd: Streams,
    v_bmhd: Streams,
    reads: Reads | None = None,
) -> list[Array]:
    """A kernel for one device on every device's share of `attend_streams`'s arguments.

    The compiler cannot split such a kernel: each device calls it with its samples, heads and
    queries, and with all keys and values of those, gathered over `context`. The gradients of keys
    and values are summed and scattered on the way back.
    """
    axes, reads = ("batch", "length", "heads", None), reads or reads_all(q_blhd, k_bmhd)
    queries, keys = ([activation_spec(x.shape, *axes) for x in xs] for xs in (q_blhd, k_bmhd))
    split = [spec and spec[1] for spec in keys]

    def local(q, k, v):
        def whole(xs: Streams) -> Iterator[Array]:
            return _of_each(
                reads, lambda read: join_shards([xs[i] for i in read], [split[i] for i in read], 1)
            )

        return [kernel(*qkv) for qkv in zip(q, whole(k), whole(v))]

    arguments = (list(xs) for xs in (q_blhd, k_bmhd, v_bmhd))
    if queries[0] is None:
        return local(*arguments)
    # Pallas kernels do not say over which axes their results vary, so it is not checked.
    shards = jax.shard_map(
        local, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False
    )
    return shards(*arguments)


def splash_on_shards(
    q: Streams,
    k: Streams,
    v: Streams,
    scales: tuple[Array, Array],
    ropes: Sequence[Rope] | None,
    name: str | None = None,
    reads: Reads | None = None,
    *,
    interpret: bool = False,
) -> list[Array]:
    """`splash_projected` on every device's share, as `on_shards` does for a kernel.

    Args:
        q, k, v: as projected, [b, length, heads · 128] of every stream. Where there are fewer
            streams of queries than of keys, they are those of the last.
        scales: of the norms of queries and keys.
        ropes: of every stream of keys, to rotate its queries and keys alike; None for no rotation.
        name, reads: see `attend` and `attend_streams`.
        interpret: see `splash`.
    """
    reads = reads or reads_all(q, k)
    queries, keys = ([activation_spec(x.shape, *_projected_axes(x)) for x in xs] for xs in (q, k))

    def local(q, k, v, scales, ropes):
        tables = None if ropes is None else [rotation_tables(*rope) for rope in ropes]
        split = [spec and spec[1] for spec in keys]
        return splash_projected(q, k, v, *scales, tables, reads, name, split, interpret=interpret)

    arguments = *(list(xs) for xs in (q, k, v)), scales, None if ropes is None else list(ropes)
    if queries[0] is None:
        return local(*arguments)
    whole = PartitionSpec()
    positions = None if ropes is None else [PartitionSpec(spec[1]) for spec in keys]
    shards = jax.shard_map(
        local, in_specs=(queries, keys, keys, whole, positions), out_specs=queries, check_vma=False
    )
    return shards(*arguments)


def _projected_axes(x: Array) -> tuple[str | None, ...]:
    """Logical axes of queries, keys or values [b, length, heads · 128] as projected.

    A text, or a small view, is so short that every device has all of it.
    """
    return "batch", "length" if x.shape[1] > SHORT else None, "heads"


def check_context(tokens: int) -> None:
    """Raises ValueError if a long sequence cannot be split over the mesh axis `context`.

    It would be left whole, and every device would do the work of all.
    """
    ways = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    if tokens % ways and tokens**2 > FEW_LOGITS:
        divisors = ", ".join(str(n) for n in range(1, 4 * ways) if tokens % n == 0)
        raise ValueError(
            f"{tokens} tokens cannot be split over context={ways} devices; set config.mesh.context "
            f"to a divisor of the tokens ({divisors}, ...)."
        )


# --- The kernels, and the choice among them ---


def check_kernel(name: str) -> None:
    """Raises ValueError if there is no such kernel."""
    if name not in KERNELS:
        raise ValueError(f"attention must be one of {', '.join(KERNELS)}; got {name!r}.")


def choose_kernel(requested: str, q: Array, keys: int) -> str:
    """The kernel for queries [b, l, heads, head_dim]: "xla", "cudnn" or "splash".

    Args:
        q: the queries; of several streams, the first.
        keys: how many they attend to.
        requested: one of `KERNELS`. "auto" takes the kernel of the platform where there are more
            than `FEW_LOGITS` logits per head, and XLA where there are fewer or where cuDNN does
            not know the dtype or head size. Another name is taken at its word.

    Raises:
        ValueError: if cuDNN is requested for what it cannot compute.
    """
    check_kernel(requested)
    cannot = _not_for_cudnn(q)
    if requested == "cudnn" and cannot:
        raise ValueError(f"attention='cudnn' needs {cannot}; use attention='auto' or 'xla'.")
    if requested != "auto":
        return requested
    if q.shape[1] * keys <= FEW_LOGITS:
        return "xla"
    if platform() == "tpu":
        return "splash"
    return "cudnn" if platform() == "gpu" and not cannot else "xla"


def _not_for_cudnn(q: Array) -> str:
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"precision 'bfloat16', got arrays of {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > CUDNN_HEAD_DIM:
        return f"heads of a multiple of 8 and at most {CUDNN_HEAD_DIM} channels, got {q.shape[-1]}"
    return ""


def xla(q: Array, k: Array, v: Array, name: str | None = None) -> Array:
    """By XLA, anywhere; `name` as in `attend`."""
    return keep(jax.nn.dot_product_attention(q, k, v, implementation="xla"), name)


def cudnn(q: Array, k: Array, v: Array, name: str | None = None) -> Array:
    """By cuDNN's flash attention, in bfloat16; `name` as in `attend`."""
    unnamed = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    attention = jax.custom_vjp(unnamed)

    def forward(q, k, v):
        # The backward kernel needs the output and the softmax's sums. They can be kept only if
        # they are named here: with a name on the result alone, the forward kernel would run twice.
        y, pullback = jax.vjp(unnamed, q, k, v)
        named = {id(x): x for x in (q, k, v)} | {id(y): keep(y, name)}
        same = lambda x: named[id(x)] if id(x) in named else keep(x, name)  # noqa: E731
        return same(y), jax.tree.map(same, pullback)

    attention.defvjp(forward, lambda pullback, dy: pullback(dy))
    return attention(q, k, v)


# --- The module ---


class Attention(nnx.Module):
    """Multi-head attention with RMS-normalised queries and keys, no biases.

    Args:
        key: PRNG key of the initialisation.
        d: width of the queries and of the output.
        d_context: width of what keys and values are read from (`d` for self-attention).
        num_heads: number of heads; `d` is split evenly among them.
        lora: adapters on q_proj, k_proj, v_proj, output_proj where targeted.
        kernel: see `choose_kernel`.
        kept: whether rematerialisation may keep the result. It is as large for a few keys as for
            many, so it should be worth the memory.
        int8: see `Linear`.
    """

    def __init__(
        self,
        key: Array,
        d: int,
        d_context: int,
        num_heads: int,
        lora: LoRA | None = None,
        *,
        kernel: str = "auto",
        kept: bool = True,
        int8: bool = False,
    ):
        q, k, v, out = jax.random.split(key, 4)
        self.num_heads, kinds = num_heads, dict(lora=lora, int8=int8)
        self.kernel, self.name = kernel, ATTENTION if kept else None
        self.q_proj = Linear(q, d, d, ("embed", "heads"), name="q_proj", **kinds)
        self.k_proj = Linear(k, d_context, d, ("embed", "heads"), name="k_proj", **kinds)
        self.v_proj = Linear(v, d_context, d, ("embed", "heads"), name="v_proj", **kinds)
        self.output_proj = Linear(out, d, d, ("heads", "embed"), name="output_proj", **kinds)
        self.q_norm = RMSNorm(d // num_heads)
        self.k_norm = RMSNorm(d // num_heads)

    def keys_values(self, context: Array, rope: Rope | None = None) -> KeysValues:
        """Keys and values [b, m, heads, head_dim] of a context [b, m, d_context].

        For a context that is attended to often: `__call__` takes them in place of the context.
        """
        return self._keys_values(*linears(context, self.k_proj, self.v_proj), rope)

    def __call__(self, x: Array, context: Array | KeysValues, rope: Rope | None = None) -> Array:
        """Attends from `x` [b, l, d] to a context; returns [b, l, d].

        Args:
            x: what queries are made of.
            context: [b, m, d_context], in self-attention `x` itself; or its keys and values.
            rope: rotates the queries, and the keys that are made here.
        """
        ropes = None if rope is None else [rope]
        if isinstance(context, tuple):
            k, v = context
            return self._attend([self.q_proj(x)], [k], [v], ropes)[0]
        return self.streams([x], None if context is x else context, ropes)[0]

    def projected(self, x: Array) -> KeysValues:
        """Keys and values of a stream [b, l, d] as `streams` takes them for `known`: [b, l, d]."""
        return tuple(linears(x, self.k_proj, self.v_proj))

    def streams(
        self,
        xs: Streams,
        context: Array | None = None,
        ropes: Sequence[Rope] | None = None,
        reads: Reads | None = None,
        known: Sequence[KeysValues] = (),
    ) -> list[Array]:
        """Attends from every stream to the tokens of all, or to a context that all of them read.

        Args:
            xs: tokens of every stream [b, l, d].
            context: [b, m, d_context]; None in self-attention.
            ropes: of every stream, in self-attention; None for no rotation.
            reads: in self-attention, the streams that each reads; None for all.
            known: `projected` of streams that come before `xs` and are only read.
        """
        if context is None:
            q, k, v = zip(*(linears(x, self.q_proj, self.k_proj, self.v_proj) for x in xs))
            k, v = ([keep(x, PROJECTED) for x in projected] for projected in (k, v))
            k, v = ([pair[i] for pair in known] + xs for i, xs in enumerate((k, v)))
        else:
            q = [self.q_proj(x) for x in xs]
            k, v = ([x] for x in linears(context, self.k_proj, self.v_proj))
        q = [keep(x, PROJECTED) for x in q]
        if self._splash(q, k):
            scales = self.q_norm.scale[...], self.k_norm.scale[...]
            y = splash_on_shards(q, k, v, scales, ropes, self.name, reads)
            return [self.output_proj(x) for x in y]
        turned = ropes or [None] * len(k)
        k, v = zip(*(self._keys_values(*one) for one in zip(k, v, turned)))
        return self._attend(q, k, v, ropes and ropes[-len(q) :], reads)

    def _splash(self, q: Streams, k: Streams) -> bool:
        """Whether the TPU's kernels take queries and keys as they are projected."""
        shape = jax.eval_shape(lambda x: heads(x, self.num_heads), q[0])
        if choose_kernel(self.kernel, shape, sum(x.shape[1] for x in k)) != "splash":
            return False
        lengths = (shard_shape(x.shape, *_projected_axes(x))[1] for x in (q[0], k[0]))
        return can_project(q[0].shape[-1], self.num_heads, *lengths)

    def _attend(
        self,
        q: Streams,
        k: Streams,
        v: Streams,
        ropes: Sequence[Rope] | None,
        reads: Reads | None = None,
    ) -> list[Array]:
        turned = ropes or [None] * len(q)
        q = [self._ready(x, self.q_norm, rope) for x, rope in zip(q, turned)]
        y = attend_streams(q, k, v, self.kernel, self.name, reads)
        return [self.output_proj(x.reshape(*x.shape[:2], -1)) for x in y]

    def _keys_values(self, k: Array, v: Array, rope: Rope | None) -> KeysValues:
        return self._ready(k, self.k_norm, rope), heads(v, self.num_heads)

    def _ready(self, x: Array, norm: RMSNorm, rope: Rope | None) -> Array:
        x = norm(heads(x, self.num_heads))
        return x if rope is None else rotate(x, *rope)


def heads(x: Array, count: int) -> Array:
    """[b, l, heads · head_dim] as [b, l, heads, head_dim]."""
    return x.reshape(*x.shape[:-1], count, -1)
