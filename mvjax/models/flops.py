"""Floating-point operations counted from shapes: what a step must compute, recomputation left out.

The compiler's own count is of no use here: it counts the body of a scan once, and a kernel as zero.
Only matrix products count, a multiplication with its addition as two: a product [n, a] x [a, b] is
2 n a b operations, attention of n queries to m keys over all heads of width d together 4 n m d.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax

from data_pipelines.clip import PATCH, tokens
from mvjax.models.action_decoder import ActionDecoderConfig, embedder_widths
from mvjax.models.lora import LoRA
from mvjax.models.video_dit import VideoDiTConfig
from mvjax.parallel import chip


@dataclass(frozen=True)
class Products:
    """Operations of one forward pass, by what training adds to them.

    Attributes:
        learned: products with kernels that learn, and of activations with each other.
        fixed: products with kernels that do not learn.
    """

    learned: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: "Products") -> "Products":
        return Products(self.learned + other.learned, self.fixed + other.fixed)

    def __rmul__(self, count: int) -> "Products":
        return Products(count * self.learned, count * self.fixed)

    @property
    def forward(self) -> float:
        """One pass."""
        return self.learned + self.fixed

    @property
    def training(self) -> float:
        """A pass and its gradients: by both factors of a product, or by the input alone."""
        return 3 * self.learned + 2 * self.fixed


def video_dit_flops(
    config: VideoDiTConfig,
    latent_shape_thw: tuple[int, int, int],
    text_length: int,
    *,
    layers: int | None = None,
    views: Iterable[tuple[int, ...]] = (),
) -> float:
    """Operations of a forward pass over one sample.

    Args:
        config: the video DiT.
        latent_shape_thw: latent frames, height and width.
        text_length: text tokens.
        layers: the last block that runs, as for `VideoDiT.hidden`; None for the whole network.
        views: latents (frames, height, width, ...) of the observed views.
    """
    latents = latent_shape_thw, *views
    return _video_dit(config, latents, text_length, layers, config.lora).forward


def action_decoder_flops(config: ActionDecoderConfig, context_tokens: int, draws: int) -> float:
    """Operations of a forward pass over one sample with `draws` draws of action noise."""
    return _action_decoder(config, context_tokens, draws, draws, draws).forward


def sampling_flops(
    config: ActionDecoderConfig, context_tokens: int, draws: int, steps: int
) -> tuple[float, float]:
    """Operations of a query in the decoder: keys and values of the context, and the Euler steps.

    All draws are at the same noise level in a step.
    """
    keys_values = _action_decoder(config, context_tokens, 0, 0, 0).forward
    whole = _action_decoder(config, context_tokens, steps * draws, steps, 1).forward
    return keys_values, whole - keys_values


def step_flops(experiment: Any) -> float:
    """Operations of a training step of an `Experiment`, per sample of the batch.

    Three forward passes for what learns, two for the products with kernels that stay fixed under
    LoRA, and one for the frozen backbone of stage 2, to its last block that is read. In joint
    training one pass of the whole backbone serves both networks.
    """
    config, model, text = experiment.config, experiment.video, experiment.config.text.length
    latents = experiment.read_shapes
    if experiment.learns_video:
        video = _video_dit(model, latents, text, None, model.lora).training
    else:  # frozen, with its adapters merged
        video = _video_dit(model, latents, text, config.context_layer, None).forward
    if not experiment.learns_actions:
        return video
    decoder, draws = experiment.decoder, config.flow.action_draws
    context = experiment.context_tokens
    return video + _action_decoder(decoder, context, draws, draws, draws).training


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None for a CPU or a kind that is not known."""
    known = chip(device.device_kind)
    return known.peak_flops if known else None


def _video_dit(
    config: VideoDiTConfig,
    latents: tuple[tuple[int, ...], ...],
    text_length: int,
    layers: int | None,
    lora: LoRA | None,
) -> Products:
    """Of latents (frames, height, width, ...): the video's, then those of the views."""
    video, *views = latents
    n, d, rank = sum(map(tokens, latents)), config.width, config.adaln_rank
    pairs = n * n  # of a query and a key
    if 0 < config.observed_latents < video[0]:
        later = tokens((video[0] - config.observed_latents, *video[1:]))
        pairs -= (n - later) * later  # the present does not attend to what comes later
    t = video[0] + len(views)  # all frames of a view have the same time

    def kernel(name: str, rows: int, d_in: int, d_out: int) -> Products:
        dense = 2.0 * rows * d_in * d_out
        # Under LoRA kernels get no gradient, but for those of adaLN, which learn in full.
        if lora is None or name == "adaln":
            return Products(learned=dense)
        adapter = 2.0 * rows * lora.rank * (d_in + d_out) if name in lora.targets else 0.0
        return Products(learned=adapter, fixed=dense)

    def modulation(chunks: int, times: int = t) -> Products:
        return kernel("adaln", times, d, rank) + kernel("adaln", times, rank, chunks * d)

    # Attention is two products, with both factors needing a gradient: q kᵀ, and weights with v.
    block = Products(learned=4.0 * pairs * d + 4.0 * n * text_length * d)
    for rows, width in ((n, d), (text_length, config.text_dim)):  # self- and cross-attention
        block += kernel("q_proj", n, d, d) + kernel("output_proj", n, d, d)
        block += kernel("k_proj", rows, width, d) + kernel("v_proj", rows, width, d)
    hidden = config.mlp_ratio * d
    block += kernel("layer1", n, d, hidden) + kernel("layer2", n, hidden, d) + 3 * modulation(3)

    total = kernel("x_embedder", n, PATCH**2 * (config.latent_channels + 2), d)
    total += kernel("linear_1", t, d, d) + kernel("linear_2", t, d, 3 * d)
    if config.text_projection_dim:
        total += kernel("text_projection", text_length, config.text_input_dim, config.text_dim)
    if layers is None:
        features = PATCH**2 * config.latent_channels
        total += modulation(2, video[0]) + kernel("linear", tokens(video), d, features)
    return total + (config.num_blocks if layers is None else layers) * block


def _action_decoder(
    config: ActionDecoderConfig, context_tokens: int, chunks: int, times: int, sigmas: int
) -> Products:
    """Of one context, noisy chunks that attend to it, and their noise levels.

    `times` are those of actions, `sigmas` the video's noise levels that are embedded beside them.
    """
    d, time_rank, rank = config.width, config.time_rank, config.adaln_rank
    p, a = config.proprio_horizon, config.action_horizon
    n = p + a

    def kernel(rows: int, d_in: int, d_out: int) -> Products:
        return Products(learned=2.0 * rows * d_in * d_out)

    def modulation(count: int) -> Products:  # once for proprioception, once for the actions
        return kernel(2, time_rank, rank) + kernel(2, rank, count * d)

    def embedder(rows: int, dim: int) -> Products:
        return sum(
            (kernel(rows, *sizes) for sizes in pairwise(embedder_widths(dim, d))), Products()
        )

    keys_values = 2 * kernel(context_tokens, config.context_dim, d)
    hidden = config.mlp_ratio * d
    block = Products(learned=4.0 * n * (n + context_tokens) * d) + 6 * kernel(n, d, d)
    block += kernel(n, d, hidden) + kernel(n, hidden, d)
    chunk = embedder(p, config.proprio_dim) + embedder(a, config.action_dim)
    chunk += kernel(n, d, config.action_dim) + config.num_blocks * block
    level = kernel(2, d, d) + kernel(2, d, time_rank) + kernel(2, time_rank, 3 * d)
    level += modulation(2) + config.num_blocks * 3 * modulation(3)
    levels = times * level + sigmas * (kernel(1, d, d) + kernel(1, d, time_rank))
    return config.num_blocks * keys_values + chunks * chunk + levels
