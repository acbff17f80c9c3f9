"""The action decoder of mimic-video (`World2ActionDIT`): reads the video's residual stream.

In this order: sizes; the decoder's block; the network; its embedders of actions and proprioception;
its joint embedding of action time and video time.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import log, sqrt
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mvjax.models.attention import Attention, KeysValues, check_kernel
from mvjax.models.layers import (
    MLP,
    FinalLayer,
    LayerNorm,
    Linear,
    Modulation,
    RMSNorm,
    check_remat,
    compute_dtype,
    gelu,
    kaiming_uniform,
    modulate,
    round_to_bfloat16,
    run_blocks,
    silu,
    stack,
    time_dtype,
    truncated_normal,
)
from mvjax.parallel import constrain

Array = jax.Array

PROPRIO_TIME = 1e-3  # the fixed flow time of proprioception tokens
MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0  # of the time features


@dataclass(frozen=True)
class ActionDecoderConfig:
    """Sizes of an action decoder; `mvjax.models.presets` names the released ones.

    `precision`, `attention` and `remat` are as in `VideoDiTConfig`.
    """

    width: int
    num_blocks: int
    num_heads: int
    context_dim: int
    adaln_rank: int
    time_rank: int
    action_dim: int
    action_horizon: int
    proprio_dim: int
    proprio_horizon: int = 1
    mlp_ratio: int = 4
    precision: str = "float32"
    attention: str = "auto"
    remat: str = "none"

    def __post_init__(self):
        compute_dtype(self.precision)
        check_kernel(self.attention)
        check_remat(self.remat)
        for name in ("action_horizon", "proprio_horizon", "action_dim", "proprio_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.width % self.num_heads:
            raise ValueError(
                f"Decoder width {self.width} is not a multiple of num_heads {self.num_heads}."
            )

    @property
    def dtype(self) -> str:
        """The dtype of matmuls and the residual stream."""
        return compute_dtype(self.precision)


class Levels(NamedTuple):
    """What pairs of noise levels, of actions and video, do to the decoder.

    Proprioception has one time and all actions of a chunk another: two rows, whatever the chunk's
    length. They are not per sample: every sample is at the same levels. Where some actions are
    given, a third row is that of clean actions, and `given` chooses by sample and action.

    Attributes:
        blocks: shift, scale and gate of every sublayer of every block, [s, num_blocks, 2 or 3, d].
        final: shift and scale of the final layer, [s, 2 or 3, d].
        given: which actions are clean, bool [b, action_horizon]; None: none of them.
    """

    blocks: Any
    final: list[Array]
    given: Array | None = None


class Block(nnx.Module):
    """Cross-attention to the video context, self-attention, MLP; modulated per token."""

    def __init__(self, key: Array, config: ActionDecoderConfig):
        keys = jax.random.split(key, 6)
        d, heads, rank = config.width, config.num_heads, config.adaln_rank
        kernel = config.attention
        self.cross_attn = Attention(keys[0], d, config.context_dim, heads, kernel=kernel)
        self.self_attn = Attention(keys[1], d, d, heads, kernel=kernel)
        self.mlp = MLP(keys[2], d, config.mlp_ratio * d)
        self.adaln_cross_attn = Modulation(keys[3], config.time_rank, d, rank, 3)
        self.adaln_self_attn = Modulation(keys[4], config.time_rank, d, rank, 3)
        self.adaln_mlp = Modulation(keys[5], config.time_rank, d, rank, 3)

    def modulations(self, embedding: Array, shared: Array) -> list[list[Array]]:
        """Shift, scale and gate of the three sublayers, a row for each time of `embedding`."""
        layers = self.adaln_cross_attn, self.adaln_self_attn, self.adaln_mlp
        return [layer(embedding, shared) for layer in layers]

    def __call__(
        self, x: Array, modulations: list[list[Array]], context: Array | KeysValues
    ) -> Array:
        """One block on tokens x [b·r, n, d] whose context is shared by the r draws of a sample.

        The modulations are per token; the context is normalised hidden states, or this block's keys
        and values of them.
        """
        # The context first, as published; the video DiT attends to its text second.
        cross_attn, self_attn, mlp = modulations
        x = x + cross_attn[2] * self._cross(modulate(x, *cross_attn[:2]), context)
        u = modulate(x, *self_attn[:2])
        x = x + self_attn[2] * self.self_attn(u, u)
        x = x + mlp[2] * self.mlp(modulate(x, *mlp[:2]))
        return constrain(x, "batch", None, None)

    def _cross(self, u: Array, context: Array | KeysValues) -> Array:
        samples = len(jax.tree.leaves(context)[0])
        # Without positions or mask, the draws of one sample are simply more queries to its context.
        y = self.cross_attn(u.reshape(samples, -1, u.shape[-1]), context)
        return y.reshape(u.shape)


class ActionDecoder(nnx.Module):
    """Predicts the flow velocity of an action chunk from proprioception and the video's context."""

    def __init__(self, config: ActionDecoderConfig, key: Array):
        keys = jax.random.split(key, 7)
        d, tokens = config.width, config.proprio_horizon + config.action_horizon
        self.config = config
        self.context_norm = LayerNorm(config.context_dim)
        self.proprio_embedder = Embedder(keys[0], config.proprio_dim, d)
        self.action_embedder = Embedder(keys[1], config.action_dim, d)
        self.proprio_mask_token = nnx.Param(
            truncated_normal(keys[2], (1, 1, d), d), axes=(None,) * 3
        )
        self.position = nnx.Param(truncated_normal(keys[3], (1, tokens, d), d), axes=(None,) * 3)
        self.t_embedder = PairTimeEmbedding(keys[4], d, config.time_rank)
        self.t_embedding_norm = RMSNorm(config.time_rank)
        self.blocks = stack(lambda k: Block(k, config), keys[5], config.num_blocks)
        self.final_layer = FinalLayer(
            keys[6], config.time_rank, d, config.adaln_rank, config.action_dim
        )

    def context_keys_values(self, context: Array) -> KeysValues:
        """Every block's keys and values of the context: computed once, reused by all Euler steps.

        Training calls the decoder with the context itself instead: each block then makes its keys
        and values when it needs them, and rematerialisation need not keep them.

        Args:
            context: hidden states of the video DiT [b, m, context_dim].

        Returns:
            keys, values: [num_blocks, b, m, heads, head_dim].
        """
        context = self._normalised(context)
        one = lambda _, block: (None, block.cross_attn.keys_values(context))  # noqa: E731
        return jax.lax.scan(one, None, self.blocks)[1]

    def __call__(
        self,
        proprio: Array,
        noisy_actions: Array,
        action_time: Array,
        video_sigma: Array,
        context: Array | KeysValues,
        drop_proprio: Array | None = None,
    ) -> Array:
        """The velocity ε - x0 of the action chunk.

        With r action-noise draws per video pass, the leading axis of the first four arguments is
        b·r (the draws of a sample lie together) while the context has b samples.

        Args:
            proprio: normalised proprioception [b, proprio_horizon, proprio_dim].
            noisy_actions: (1 - t) x0 + t ε, scaled by `flow.scale_noisy_actions`,
                [b, action_horizon, action_dim].
            action_time: flow time of the actions [b, 1], or of every action [b, action_horizon].
            video_sigma: noise level σ of the video the context comes from [b, 1].
            context: hidden states of the video DiT [b, m, context_dim], or what
                `context_keys_values` made of them.
            drop_proprio: 1 where the mask token replaces the proprioception [b], or None.

        Returns:
            float32 [b, action_horizon, action_dim].
        """
        chex.assert_shape(action_time, (len(proprio), {1, self.config.action_horizon}))
        each = self.config.proprio_horizon if action_time.shape[1] > 1 else 1
        time = self._time(_with_proprio(action_time, each), video_sigma)
        out = self._tokens(proprio, noisy_actions, time, context, drop_proprio)
        return out[:, self.config.proprio_horizon :]

    def levels(self, action_times: Array, video_sigma: Array, *, clean: bool = False) -> Levels:
        """The decoder's modulation at s action times [s] and one noise level of the video.

        It depends on nothing else: `at_levels` takes it, so that sampling computes it once for all
        Euler steps, queries and draws. `clean` adds the row of given actions, which have time 0.
        """
        # One sample with the times of all steps: as samples, steps would be split over devices.
        rows = _with_proprio(action_times[:, None])
        if clean:
            rows = jnp.pad(rows, ((0, 0), (0, 1)))
        time = self._time(rows.reshape(1, -1), jnp.full((1, 1), video_sigma))

        def by_step(modulations: Any) -> Any:
            return jax.tree.map(lambda m: m.reshape(-1, 2 + clean, m.shape[-1]), modulations)

        blocks = jax.vmap(lambda block: by_step(block.modulations(*time)), out_axes=1)(self.blocks)
        return Levels(blocks, by_step(self.final_layer.adaln(*time)))

    def at_levels(
        self, levels: Levels, proprio: Array, noisy_actions: Array, context: Array | KeysValues
    ) -> Array:
        """As `__call__`, with one entry of `levels` in place of the noise levels."""
        out = self._tokens(proprio, noisy_actions, levels, context, None)
        return out[:, self.config.proprio_horizon :]

    def tokens(
        self, proprio, noisy_actions, token_times, video_sigma, context, drop_proprio=None
    ) -> Array:
        """As `__call__`, with a flow time for every token [b, n]; the output of all n tokens."""
        time = self._time(token_times, video_sigma)
        return self._tokens(proprio, noisy_actions, time, context, drop_proprio)

    def hidden(
        self, proprio, noisy_actions, token_times, video_sigma, context, *, layer: int
    ) -> Array:
        """The residual stream [b, n, width] after block `layer`; arguments as in `tokens`."""
        time = self._time(token_times, video_sigma)
        return self._run(self._embed(proprio, noisy_actions, None), time, context, layer)

    def _tokens(self, proprio, noisy_actions, time, context, drop_proprio) -> Array:
        x = self._embed(proprio, noisy_actions, drop_proprio)
        x = self._run(x, time, context, self.config.num_blocks)
        known = isinstance(time, Levels)
        final = time.final if known else self.final_layer.adaln(*time)
        spread = self._per_token(final, time.given if known else None)
        return self.final_layer(x, *spread).astype(jnp.float32)

    def _time(self, times: Array, video_sigma: Array) -> tuple[Array, Array]:
        """The time embedding [b, k, rank] and the modulation that all sublayers share [b, k, 3 d].

        k is 2, for proprioception and actions, or the number of tokens, or twice that of steps.
        """
        chex.assert_shape(video_sigma, (len(times), 1))
        dtype = time_dtype(self.config.precision)
        z, shared = self.t_embedder(times, video_sigma / (1 + video_sigma), dtype)
        both = self.t_embedding_norm(z), shared
        return tuple(constrain(e.astype(self.config.dtype), "batch", None, None) for e in both)

    def _per_token(self, modulation: Any, given: Array | None = None) -> Any:
        """[..., k, d] of `_time` as [..., tokens, d]; with `given` [3, d] as [b, tokens, d]."""
        p, a = self.config.proprio_horizon, self.config.action_horizon
        is_action = np.arange(p + a)[:, None] >= p
        if given is not None:
            is_clean = jnp.pad(given, ((0, 0), (p, 0)))[..., None]

        def spread(m: Array) -> Array:
            if given is not None:
                return jnp.where(is_clean, m[2], jnp.where(is_action, m[1], m[0]))
            if m.shape[-2] == p + a:
                return m
            return jnp.where(is_action, m[..., 1:, :], m[..., :1, :])

        return jax.tree.map(spread, modulation)

    def _embed(self, proprio: Array, noisy_actions: Array, drop_proprio: Array | None) -> Array:
        config = self.config
        b = len(proprio)
        chex.assert_shape(proprio, (b, config.proprio_horizon, config.proprio_dim))
        chex.assert_shape(noisy_actions, (b, config.action_horizon, config.action_dim))
        state = self.proprio_embedder(proprio.astype(config.dtype))
        if drop_proprio is not None:
            chex.assert_shape(drop_proprio, (b,))  # another shape would broadcast
            drop = drop_proprio[:, None, None].astype(config.dtype)
            state = (1 - drop) * state + drop * self.proprio_mask_token[...].astype(config.dtype)
        actions = self.action_embedder(noisy_actions.astype(config.dtype))
        x = jnp.concatenate([state, actions], axis=1) + self.position[...].astype(config.dtype)
        return constrain(x, "batch", None, None)

    def _normalised(self, context: Array) -> Array:
        return self.context_norm(context.astype(self.config.dtype))

    def _run(self, x, time, context: Array | KeysValues, layer: int) -> Array:
        ready, known = isinstance(context, tuple), isinstance(time, Levels)
        given = time.given if known else None
        keys_values, whole = (context, None) if ready else (None, self._normalised(context))

        # What differs from block to block is scanned with the blocks.
        def step(x, block_and_its):
            block, kv, modulations = block_and_its
            modulations = modulations if known else block.modulations(*time)
            return block(x, self._per_token(modulations, given), kv if ready else whole)

        each = self.blocks, keys_values, time.blocks if known else None
        return run_blocks(step, x, each, layer, self.config.remat)


def _with_proprio(action_time: Array, count: int = 1) -> Array:
    """[b, k] as [b, count + k]: proprioception is clean: its tokens have a time near 0."""
    proprio = jnp.full_like(action_time, PROPRIO_TIME, shape=(len(action_time), count))
    return jnp.concatenate([proprio, action_time], axis=1)


def embedder_widths(d_in: int, d: int) -> list[int]:
    """Widths of an embedder's layers, about ×4 each from `d_in` to `d` (release, `target_mult`)."""
    ratio = d / d_in
    hops = max(1, round(log(ratio, 4)))
    widths = [d_in]
    for _ in range(hops - 1):
        widths.append(round(widths[-1] * ratio ** (1 / hops)))
    return [*widths, d]


class Embedder(nnx.Module):
    """Lifts actions or proprioception to the width: linears with GELU between, times 1/√d.

    Kernels start uniform, with the gain of a ReLU but for the last (the release, `ActionEmbedder`).
    """

    def __init__(self, key: Array, d_in: int, d: int):
        widths = embedder_widths(d_in, d)
        self.d, self.depth = d, len(widths) - 1
        for i, sizes in enumerate(pairwise(widths)):
            # Whole on every device (no axes): they are small, and 4 or 10 inputs do not divide.
            init = partial(kaiming_uniform, gain=1.0 if i == self.depth - 1 else sqrt(2))
            layer_key = jax.random.fold_in(key, i)
            layer = Linear(layer_key, *sizes, (None, None), bias=True, init=init)
            setattr(self, f"layer{i}", layer)

    def __call__(self, x: Array) -> Array:
        """Maps [b, n, d_in] to [b, n, d]."""
        for i in range(self.depth):
            x = getattr(self, f"layer{i}")(gelu(x) if i else x)
        return x * self.d**-0.5


def time_features(t: Array, d: int) -> Array:
    """concat(sin, cos) of 2π t / period, for d/2 periods from 4e-3 to 4, rounded to bfloat16.

    The release computes the angle in float64 and rounds the features to bfloat16 in every
    precision, so the rounding is part of the network. Without float64 on accelerators the number
    of turns is reduced modulo one exactly: `t` and the frequencies are cut into 12-bit pieces
    whose products fit float32.

    Args:
        t: flow times in [0, 1], any shape.
        d: number of features.

    Returns:
        float32 [..., d], each value representable in bfloat16.
    """
    exponent = np.arange(d // 2) / (d // 2 - 1)
    frequency = 1.0 / (MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** exponent)
    f_high = _high_bits_numpy(frequency)
    f_mid = _high_bits_numpy(frequency - f_high)
    f_low = (frequency - f_high - f_mid).astype(np.float32)
    t = t.astype(jnp.float32)[..., None]
    # The first four products below are exact in float32; the last is small, so its rounding is.
    t_high = _high_bits(t)
    t_low = t - t_high
    turns = sum(
        _fraction(product)
        for product in (t_high * f_high, t_high * f_mid, t_low * f_high, t_low * f_mid, t * f_low)
    )
    angle = 2 * np.pi * _fraction(turns)
    features = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return round_to_bfloat16(features)


def _high_bits(x: Array) -> Array:
    """The leading 12 significant bits of float32 values."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _high_bits_numpy(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFF000)
    return bits.view(np.float32)


def _fraction(turns: Array) -> Array:
    return turns - jnp.round(turns)


class PairTimeEmbedding(nnx.Module):
    """z = B(φ_a) ⊙ C(φ_v) - b_B ⊙ b_C, with φ = SiLU(Linear(features of the time)).

    Subtracting the product of the biases leaves the bilinear term and both linear marginals
    (mimic-video release, `World2ActionDIT.t_embedder.pair`).
    """

    def __init__(self, key: Array, d: int, rank: int):
        keys = jax.random.split(key, 5)
        axes = ("embed", None)
        self.d = d
        self.proj_action = Linear(keys[0], d, d, axes, bias=True)
        self.proj_video = Linear(keys[1], d, d, axes, bias=True)
        self.to_rank_action = Linear(keys[2], d, rank, axes, bias=True)
        self.to_rank_video = Linear(keys[3], d, rank, axes, bias=True)
        # The published start; with biases of zero, z would begin without its linear marginals.
        self.to_rank_action.bias[...] = jnp.full(rank, 0.382050174)
        self.to_rank_video.bias[...] = jnp.full(rank, 0.382050174)
        self.to_shared = Linear(keys[4], rank, 3 * d, axes)

    def __call__(self, action_time: Array, video_time: Array, dtype) -> tuple[Array, Array]:
        """Time embedding z [b, n, rank] and the shared modulation term [b, n, 3 d].

        Args:
            action_time: flow time of every token [b, n].
            video_time: flow time τ of the video [b, 1].
            dtype: compute dtype.
        """
        action = time_features(action_time, self.d).astype(dtype)
        video = time_features(video_time, self.d).astype(dtype)
        # Without this the compiler would rather split the width, as the kernels are.
        wide = silu(self.proj_action(action)), silu(self.proj_video(video))
        wide = [constrain(x, "batch", None, None) for x in wide]
        action, video = self.to_rank_action(wide[0]), self.to_rank_video(wide[1])
        constant = self.to_rank_action.bias[...].astype(dtype)
        constant *= self.to_rank_video.bias[...].astype(dtype)
        z = action * video - constant
        return z, self.to_shared(z)
