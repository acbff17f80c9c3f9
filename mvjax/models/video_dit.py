"""The video diffusion transformer of Cosmos-Predict2 (`MinimalV1LVGDiT`), channels last.

Beside the video that it predicts, the network may read observed views, such as a wrist camera: each
is a stream of tokens of its own, with positions, sizes and a time of its own. Every layer treats
the streams alike, and self-attention joins them: each token attends to those of all streams.

With attention "observed_first" the observed frames of the video are a stream of their own. They and
the views attend to each other alone, and the frames after them to everything. What the network
makes of the present then does not depend on the future: it is the same with and without it, and is
computed once for a video that is denoised in many steps.

In this order: sizes; the DiT block; the network; its embedding of time and its patches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipelines.clip import PATCH, tokens
from mvjax.flow import NetworkInput
from mvjax.models.attention import (
    Attention,
    KeysValues,
    Reads,
    Rope,
    Streams,
    check_context,
    check_kernel,
)
from mvjax.models.layers import (
    MLP,
    OUTPUT,
    PRECISIONS,
    FinalLayer,
    Linear,
    Modulation,
    RMSNorm,
    apart,
    by_frame,
    check_remat,
    compute_dtype,
    gelu,
    keep,
    modulate,
    rounded,
    run_all_blocks,
    run_blocks,
    silu,
    stack,
    time_dtype,
)
from mvjax.models.lora import LoRA
from mvjax.models.rope import rope_table
from mvjax.parallel import constrain, joined

Array = jax.Array
View = tuple[Array, Array]  # latents, and the time of all of them [b, 1]
# Keys and values as projected of the observed streams, [blocks, b, tokens, width] each.
Memory = list[tuple[Array, Array]]

ATTENTION_TO = ("all", "observed_first")
# "int8": as "bfloat16", with the large products of the blocks in int8 (`mvjax.models.int8`).
BACKBONE_PRECISIONS = (*PRECISIONS, "int8")


@dataclass(frozen=True)
class VideoDiTConfig:
    """Sizes of a video DiT; `mvjax.models.presets` names the released ones.

    Attributes:
        text_dim: width of the text that the cross-attention reads.
        rope_ratio_thw: rotary extrapolation ratios, see `mvjax.models.rope.rope_table`.
        text_projection_dim: width of the text that enters, projected to `text_dim` (Predict2.5:
            100352); 0 where it enters as it is (Predict2).
        attention_to: "all", every token attends to every other (published), or "observed_first".
        observed_latents: with "observed_first", latent frames of the video that are observed.
        views: names of the observed views beside the video.
        timestep_scale: τ of one unit of `timesteps`; 0.001 where they go to 1000 (Predict2.5).
        precision: one of `BACKBONE_PRECISIONS`; "int8" for a network that does not learn.
        attention: kernel, see `mvjax.models.attention.choose_kernel`.
        remat: what the backward pass computes again, see `mvjax.models.layers.POLICIES`.
    """

    width: int
    num_blocks: int
    num_heads: int
    text_dim: int
    adaln_rank: int
    rope_ratio_thw: tuple[float, float, float]
    mlp_ratio: int = 4
    latent_channels: int = 16
    text_projection_dim: int = 0
    timestep_scale: float = 1.0
    precision: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    lora: LoRA | None = None
    attention_to: str = "all"
    observed_latents: int = 0
    views: tuple[str, ...] = ()

    def __post_init__(self):
        _ = self.dtype
        check_kernel(self.attention)
        check_remat(self.remat)
        if self.attention_to not in ATTENTION_TO:
            raise ValueError(
                f"attention_to must be one of {', '.join(ATTENTION_TO)}; got {self.attention_to!r}."
            )
        if (self.attention_to == "observed_first") != (self.observed_latents > 0):
            raise ValueError(
                "observed_latents must be positive with attention_to='observed_first' and 0 "
                f"otherwise; got {self.observed_latents} with {self.attention_to!r}."
            )
        if len(self.rope_ratio_thw) != 3 or min(self.rope_ratio_thw) <= 0:
            raise ValueError(
                "rope_ratio_thw must be three positive ratios, of time, height and width; got "
                f"{self.rope_ratio_thw}."
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"Video DiT width {self.width} is not a multiple of num_heads {self.num_heads}."
            )
        if self.head_dim < 12 or self.head_dim % 2:
            raise ValueError(
                f"Video DiT width {self.width} and num_heads {self.num_heads} make heads of "
                f"{self.head_dim} channels; the three rotary axes need an even head_dim of 12 or "
                "more."
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    @property
    def text_input_dim(self) -> int:
        """Width of the text embedding that the network is called with."""
        return self.text_projection_dim or self.text_dim

    @property
    def dtype(self) -> str:
        """The dtype of matmuls and the residual stream."""
        return compute_dtype("bfloat16" if self.precision == "int8" else self.precision)


class Block(nnx.Module):
    """The DiT block: self-attention, cross-attention to the text, MLP.

    Each sublayer reads a layer norm of the residual stream, shifted and scaled by the noise level,
    and adds its output through a gate that the noise level sets as well.
    """

    def __init__(self, key: Array, config: VideoDiTConfig):
        keys = jax.random.split(key, 6)
        d, heads, lora = config.width, config.num_heads, config.lora
        int8 = config.precision == "int8"
        kinds = dict(kernel=config.attention, int8=int8)
        self.self_attn = Attention(keys[0], d, d, heads, lora, **kinds)
        # Not kept for the backward pass: attending to a text again is cheap.
        self.cross_attn = Attention(keys[1], d, config.text_dim, heads, lora, kept=False, **kinds)
        self.mlp = MLP(keys[2], d, config.mlp_ratio * d, lora, int8=int8)
        self.adaln_self_attn = Modulation(keys[3], d, d, config.adaln_rank, 3)
        self.adaln_cross_attn = Modulation(keys[4], d, d, config.adaln_rank, 3)
        self.adaln_mlp = Modulation(keys[5], d, d, config.adaln_rank, 3)

    def __call__(
        self,
        xs: Streams,
        times: Sequence[int],
        embedding: Array,
        shared: Array,
        text: Array,
        ropes: Sequence[Rope],
        reads: Reads | None = None,
        known: Sequence[KeysValues] = (),
    ) -> list[Array]:
        """One block on the tokens [b, l, d] of every stream.

        Args:
            xs: tokens of the streams.
            times: how many times each stream has: one for each of its latent frames, or for all.
            embedding, shared: of the times of all streams, one after another [b, sum, ...].
            text: what all of them read.
            ropes: positions of each stream, and before them of those in `known`.
            reads: the streams that each attends to; None for all.
            known: `keys_values` of streams that are only attended to.
        """
        shapes = [x.shape for x in xs]
        xs = [by_frame(x, count) for x, count in zip(xs, times)]

        def sublayer(
            xs: Streams, layer: Modulation, f: Callable[[list[Array]], list[Array]]
        ) -> list[Array]:
            us, gates = _modulated(layer, xs, times, embedding, shared)
            us = [u.reshape(shape) for u, shape in zip(us, shapes)]
            return [
                x + gate * keep(apart(y), OUTPUT).reshape(x.shape)
                for x, gate, y in zip(xs, gates, f([apart(u) for u in us]))
            ]

        attend = lambda us: self.self_attn.streams(us, None, ropes, reads, known)  # noqa: E731
        xs = sublayer(xs, self.adaln_self_attn, attend)
        xs = sublayer(xs, self.adaln_cross_attn, lambda us: self.cross_attn.streams(us, text))
        xs = sublayer(xs, self.adaln_mlp, lambda us: [self.mlp(u) for u in us])
        # The residual stream is what lives between blocks: said here, it stays split over context.
        return [
            constrain(x.reshape(shape), "batch", "length", None) for x, shape in zip(xs, shapes)
        ]

    def keys_values(
        self, xs: Streams, times: Sequence[int], embedding: Array, shared: Array
    ) -> list[KeysValues]:
        """What self-attention reads of every stream; arguments as in `__call__`."""
        frames = [by_frame(x, count) for x, count in zip(xs, times)]
        us, _ = _modulated(self.adaln_self_attn, frames, times, embedding, shared)
        return [self.self_attn.projected(u.reshape(x.shape)) for u, x in zip(us, xs)]


def _modulated(
    layer: Modulation, xs: Streams, times: Sequence[int], embedding: Array, shared: Array
) -> tuple[list[Array], list[Array]]:
    """Streams [b, t, n, d] as a sublayer reads them, and the gates of what it gives."""
    # One product for all streams: kernels are read, and their gradients summed, once.
    modulations = (m[:, :, None] for m in layer(embedding, shared))
    shifts, scales, gates = (by_stream(m, times) for m in modulations)
    return [modulate(*one) for one in zip(xs, shifts, scales)], gates


def by_stream(x: Array, counts: Sequence[int], axis: int = 1) -> list[Array]:
    """[b, sum of the counts, ...] as arrays of these lengths."""
    return [x] if len(counts) == 1 else jnp.split(x, list(accumulate(counts))[:-1], axis)


class Stream(NamedTuple):
    """What the network is given of a video, of a part of it, or of a view.

    Attributes:
        latents: [b, t, h, w, c].
        times: of every latent frame [b, t], or of all [b, 1].
        condition, padding: masks that broadcast to the latents' [b, t, h, w].
        view: its name; None for the video.
    """

    latents: Array
    times: Array
    condition: Array
    padding: Array
    view: str | None = None


def _observed_first(streams: int) -> Reads:
    """Who reads whom: observed frames, the frames after them, and then the views.

    The present reads the present: the observed frames and the views. Keys of the video are one
    part, those of the views another, see `Reads`.
    """
    views = [[*range(2, streams)]] if streams > 2 else []
    present, everything = [[0], *views], [[0, 1], *views]
    return [present, everything, *[present] * (streams - 2)]


def _one_sequence(xs: Sequence[Array]) -> Array:
    """The tokens of all streams as one sequence."""
    return xs[0] if len(xs) == 1 else constrain(joined(xs, 1), "batch", "length", None)


class VideoDiT(nnx.Module):
    """Predicts the flow velocity of a latent video; its residual stream is the decoder's context.

    Inputs of both public methods:

    - `latents`: noisy latents, already scaled to (1 - τ) x0 + τ ε, [b, t, h, w, c].
    - `timesteps`: τ / timestep_scale of every latent frame [b, t], or one for all [b, 1].
    - `text`: text embedding [b, l, text_input_dim]; padding is zeros and is attended to, as
      published.
    - `condition_mask`: 1 where the latents are clean conditioning frames, [b, t] or [b, t, h, w].
    - `padding_mask`: 1 where the picture is padding [b, h, w]; None for none.
    - `views`: of every observed view by its name, its clean latents [b, t', h', w', c] and the
      time of all of them, τ / timestep_scale [b, 1] (`mvjax.flow.network_input`); None for none.
    """

    def __init__(self, config: VideoDiTConfig, key: Array):
        keys = jax.random.split(key, 4)
        d, lora, channels = config.width, config.lora, config.latent_channels
        features = PATCH**2 * (channels + 2)  # + condition and padding mask
        self.config = config
        self.x_embedder = Linear(
            keys[0], features, d, (None, "embed"), name="x_embedder", lora=lora
        )
        self.t_embedder = TimeEmbedding(keys[1], d, lora)
        self.t_embedding_norm = RMSNorm(d)
        self.blocks = stack(lambda k: Block(k, config), keys[2], config.num_blocks)
        self.final_layer = FinalLayer(keys[3], d, d, config.adaln_rank, PATCH**2 * channels)
        # Folded in, not a fifth of the split: the other layers start as in Predict2.
        text_key, sizes = jax.random.fold_in(key, 4), (config.text_input_dim, config.text_dim)
        self.text_projection = (
            Linear(text_key, *sizes, ("embed", None), bias=True)
            if config.text_projection_dim
            else None
        )
        # From zero: at first a view differs from conditioning frames by its place alone.
        embeddings = {name: nnx.Param(jnp.zeros(d), axes=(None,)) for name in config.views}
        self.view_embedding = nnx.Dict(embeddings) if config.views else None

    def hidden(
        self,
        latents: Array,
        timesteps: Array,
        text: Array,
        condition_mask: Array,
        padding_mask: Array | None = None,
        views: Mapping[str, View] | None = None,
        *,
        layer: int,
    ) -> Array:
        """The residual stream after block `layer` (0 = patch embedding), [b, tokens, width].

        Later blocks are not run. The t·h/2·w/2 tokens of the video come first, then those of the
        views in the order of `config.views`, all in (t, h, w) row-major order. Published name:
        `return_only_hidden_states_up_to`.

        Of a network with attention "observed_first", the states of the observed frames and of the
        views are the same whether the latents go on after them or end with them.
        """
        streams = self._streams(latents, timesteps, condition_mask, padding_mask, views)
        xs, *_ = self._run(streams, text, layer=layer)
        return _one_sequence(xs)

    def velocity(self, i: NetworkInput, text: Array, memory: Memory | None = None) -> Array:
        """As `__call__`, of what `mvjax.flow.network_input` makes."""
        return self(i.latents, i.timesteps, text, i.condition_mask, views=i.views, memory=memory)

    def velocity_and_hidden(
        self, i: NetworkInput, text: Array, *, layer: int, observed_only: bool = False
    ) -> tuple[Array, Array]:
        """`velocity` and `hidden` of one pass.

        With `observed_only` the hidden states are those of the observed frames and of the views,
        as `hidden` gives them without the future: attention must be "observed_first".
        """
        streams = self._streams(i.latents, i.timesteps, i.condition_mask, None, i.views)
        if observed_only and not 0 < self.config.observed_latents < i.latents.shape[1]:
            raise ValueError(
                "The states of the observed frames depend on the frames after them, unless the "
                f"video DiT has attention_to='observed_first'; it has {self.config.attention_to!r}."
            )
        count = self.config.num_blocks
        (xs, seen), *time = self._run(streams, text, layer=count, see=layer)
        if observed_only:
            del seen[1]
        return self._velocity(xs, streams, *time), _one_sequence(seen)

    def remember(self, i: NetworkInput, text: Array) -> Memory | None:
        """What every block reads of the present, if that does not depend on the future.

        One memory then serves all steps in which a video is denoised: with it, `__call__` computes
        the frames after the observed ones alone.

        Args:
            i: what the network is called with; of the video, the observed frames are read.
            text: as in `__call__`.

        Returns:
            None where attention is to "all".
        """
        if not 0 < self.config.observed_latents < i.latents.shape[1]:
            return None
        streams = self._streams(i.latents, i.timesteps, i.condition_mask, None, i.views)
        present = [0, *range(2, len(streams))]
        ropes = [self._ropes(streams)[i] for i in present]
        streams, text = [streams[i] for i in present], self._text(text)
        times, embedding, shared = self._time(streams)

        def step(xs: list[Array], block: Block) -> tuple[list[Array], Memory]:
            known = block.keys_values(xs, times, embedding, shared)
            return block(xs, times, embedding, shared, text, ropes), known

        return jax.lax.scan(step, self._embed(streams), self.blocks)[1]

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        text: Array,
        condition_mask: Array,
        padding_mask: Array | None = None,
        views: Mapping[str, View] | None = None,
        memory: Memory | None = None,
    ) -> Array:
        """The flow velocity ε - x0 of the video, float32 [b, t, h, w, c].

        With a `memory` of the same text, observed frames and views, that of the observed frames is
        zero: it is not computed.
        """
        streams = self._streams(latents, timesteps, condition_mask, padding_mask, views)
        layer = self.config.num_blocks
        xs, *time = self._run(streams, text, layer=layer, memory=memory)
        if memory is None:
            return self._velocity(xs, streams, *time)
        # Nothing is computed but the frames after the present.
        velocity = self._velocity(xs, streams[1:2], *time)
        observed = latents[:, : self.config.observed_latents]
        return joined([jnp.zeros_like(observed, velocity.dtype), velocity], 1)

    def _velocity(
        self, xs: Sequence[Array], streams: Sequence[Stream], embedding: Array, shared: Array
    ) -> Array:
        """The velocity of the video, from the tokens after the last block and both of `_time`."""
        video = sum(one.view is None for one in streams)
        frames = [one.times.shape[1] for one in streams[:video]]
        if sum(frames) < embedding.shape[1]:  # views end here, and so do their times
            embedding, shared = embedding[:, : sum(frames)], shared[:, : sum(frames)]
        modulation = (m[:, :, None] for m in self.final_layer.adaln(embedding, shared))
        velocity = [
            unpatchify(self.final_layer(by_frame(x, count), *by), one.latents.shape)
            for x, count, one, *by in zip(
                xs, frames, streams, *(by_stream(m, frames) for m in modulation)
            )
        ]
        return joined(velocity, 1).astype(jnp.float32)

    def _run(
        self,
        streams: Sequence[Stream],
        text: Array,
        *,
        layer: int,
        see: int | None = None,
        memory: Memory | None = None,
    ) -> tuple[Any, Array, Array]:
        """The tokens of every stream after block `layer`, and both results of `_time`.

        With a memory, of the frames after the present alone. With `see`, after the last block and
        after block `see`.
        """
        config, wanted = self.config, layer if see is None else see
        if not 0 <= wanted <= config.num_blocks:
            raise ValueError(
                f"Layer {wanted} does not exist: this video DiT has blocks 1 to "
                f"{config.num_blocks} (0 is the patch embedding)."
            )
        ran, reads = streams, None
        if memory is not None:
            ran = streams[1:2]
        elif len(streams) > 1 + len(config.views):
            reads = _observed_first(len(streams))
        times, embedding, shared = self._time(ran)
        xs = self._embed(ran)
        ropes = self._ropes(streams)
        if memory is not None:  # the one that runs is the last, after those that it only reads
            ropes = [ropes[0], *ropes[2:], ropes[1]]
            views = range(1, len(ropes) - 1)
            reads = [[[0, len(views) + 1], *([views] if views else [])]]
        text = self._text(text)

        def step(xs: list[Array], block: Any) -> list[Array]:
            block, known = block if memory is not None else (block, ())
            return block(xs, times, embedding, shared, text, ropes, reads, known)

        if see is not None:
            return run_all_blocks(step, xs, self.blocks, see, config.remat), embedding, shared
        blocks = self.blocks if memory is None else (self.blocks, memory)
        return run_blocks(step, xs, blocks, layer, config.remat), embedding, shared

    def _streams(
        self, latents, timesteps, condition_mask, padding_mask, views: Mapping[str, View] | None
    ) -> list[Stream]:
        """The video, in one stream or in its observed frames and those after, and the views."""
        b, t, h, w, _ = latents.shape
        # What is too short in one of these would be broadcast.
        chex.assert_shape(latents, (b, t, h, w, self.config.latent_channels))
        chex.assert_shape(timesteps, (b, {1, t}))
        chex.assert_shape(condition_mask, (b, t) if condition_mask.ndim == 2 else (b, t, h, w))
        if condition_mask.ndim == 2:
            condition_mask = condition_mask[:, :, None, None]
        padding = jnp.zeros((b, h, w)) if padding_mask is None else padding_mask
        streams = [Stream(latents, timesteps, condition_mask, padding[:, None])]
        if 0 < (observed := self.config.observed_latents) < t:
            whole = latents, jnp.broadcast_to(timesteps, (b, t)), condition_mask
            streams = [
                Stream(*(x[:, part] for x in whole), padding[:, None])
                for part in (slice(observed), slice(observed, t))
            ]
        for name, (view, time) in self._views(views).items():
            chex.assert_shape(view, (b, None, None, None, self.config.latent_channels))
            chex.assert_shape(time, (b, 1))
            ones, zeros = jnp.ones((b, 1, 1, 1)), jnp.zeros((b, 1, 1, 1))
            streams.append(Stream(view, time, ones, zeros, name))
        return streams

    def _ropes(self, streams: Sequence[Stream]) -> list[Rope]:
        """The positions of every stream: of the video's as one, of every view from 0 on."""
        # Made here and not stored: no parameter depends on the size of the video.
        config = self.config
        angles = "bfloat16" if config.precision == "published" else "float32"

        def table(*streams: Stream) -> Rope:
            t = sum(one.latents.shape[1] for one in streams)
            h, w = streams[0].latents.shape[2:4]
            grid = (t, h // PATCH, w // PATCH)
            return rope_table(grid, config.head_dim, config.rope_ratio_thw, angles)

        video = [one for one in streams if one.view is None]
        whole = table(*video)
        counts = [tokens(one.latents.shape[1:]) for one in video]
        ropes = [*zip(*(by_stream(x, counts, axis=0) for x in whole))]
        return [*ropes, *(table(one) for one in streams if one.view is not None)]

    def _views(self, views: Mapping[str, View] | None) -> dict[str, View]:
        """The views in the order of the configuration."""
        given, wanted = views or {}, self.config.views
        if set(given) != set(wanted):
            raise ValueError(
                f"This video DiT reads the views {', '.join(wanted) or '(none)'} beside the video; "
                f"got {', '.join(sorted(given)) or 'none'}."
            )
        return {name: given[name] for name in wanted}

    def _time(self, streams: Sequence[Stream]) -> tuple[list[int], Array, Array]:
        """How many times each stream has; of all, the time embedding [b, t, d] and the modulation
        that all sublayers share [b, t, 3 d].
        """
        config = self.config
        timesteps = joined([one.times for one in streams], 1)
        tau = rounded(timesteps.astype(jnp.float32) * config.timestep_scale, config.precision)
        sinusoid = time_sinusoid(tau, config.width).astype(time_dtype(config.precision))
        # As published: what each sublayer reads is normalised, what they share is not.
        embedding, shared = self.t_embedding_norm(sinusoid), self.t_embedder(sinusoid)
        times = [one.times.shape[1] for one in streams]
        return times, embedding.astype(config.dtype), shared.astype(config.dtype)

    def _text(self, text: Array) -> Array:
        """What cross-attention reads of a text [b, l, text_input_dim]."""
        chex.assert_shape(text, (None, None, self.config.text_input_dim))
        text = text.astype(self.config.dtype)
        return text if self.text_projection is None else gelu(self.text_projection(text))

    def _embed(self, streams: Sequence[Stream]) -> list[Array]:
        """The tokens of every stream that enter the first block [b, l, d]."""
        patches = [self._patches(one.latents, one.condition, one.padding) for one in streams]
        for x, one in zip(patches, streams):
            if one.view is None:
                check_context(x.shape[1])
        xs = [self.x_embedder(x) for x in patches]
        for i, one in enumerate(streams):
            if one.view is not None:
                xs[i] += self.view_embedding[one.view][...].astype(xs[i].dtype)
        return [constrain(x, "batch", "length", None) for x in xs]

    def _patches(self, latents: Array, condition: Array, padding: Array) -> Array:
        """Latents [b, t, h, w, c] with both masks as channels, so that the embedding reads them."""
        masks = [
            jnp.broadcast_to(mask, latents.shape[:-1])[..., None].astype(latents.dtype)
            for mask in (condition, padding)
        ]
        return patchify(jnp.concatenate([latents, *masks], axis=-1)).astype(self.config.dtype)


class TimeEmbedding(nnx.Module):
    """From the sinusoid of the time to the modulation term that all sublayers share."""

    def __init__(self, key: Array, d: int, lora: LoRA | None):
        keys = jax.random.split(key)
        axes = ("embed", "mlp"), ("mlp", "embed")
        self.linear_1 = Linear(keys[0], d, d, axes[0], name="linear_1", lora=lora)
        self.linear_2 = Linear(keys[1], d, 3 * d, axes[1], name="linear_2", lora=lora)

    def __call__(self, sinusoid: Array) -> Array:
        """Maps [b, t, d] to [b, t, 3 d]."""
        return self.linear_2(silu(self.linear_1(sinusoid)))


def time_sinusoid(tau: Array, d: int) -> Array:
    """concat(cos, sin) of τ · 10000^(-i / (d/2)), i < d/2; float32 [b, t] to [b, t, d]."""
    # The frequencies in float64, rounded once.
    frequencies = jnp.asarray(np.exp(-np.log(10000.0) * np.arange(d // 2) / (d // 2)), jnp.float32)
    angles = tau[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


# Latent pictures cut into 2×2 patches, and put together again. As published, the orders inside a
# token differ: one is not the inverse of the other.


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
    """[b, tokens, 4 c] to [b, t, h, w, c]; within a token the channel is fastest."""
    b, t, h, w, c = shape
    x = x.reshape(b, t, h // PATCH, w // PATCH, PATCH, PATCH, c)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, t, h, w, c)
