"""The parts of a query to the policy, ours and PyTorch's, each to be called and timed alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from mvjax.policy.model import Inputs, medoid
from mvjax.policy.observation import Observation
from mvjax.policy.policy import Policy
from mvjax.training.flops import action_decoder_flops, video_dit_flops


class DoesNotFit(ValueError):
    """A batch is too large for the memory."""


@dataclass(frozen=True)
class Part:
    """One part of a query, for a batch.

    Attributes:
        run: computes it and returns when it is finished, given what `before` returns.
        before: makes an argument that can be used once; not measured.
    """

    run: Callable[[Any], Any]
    before: Callable[[], Any] = lambda: None


def our_parts(policy: Policy, observations: Sequence[Observation]) -> dict[str, Part]:
    """The parts of a query to a policy, compiled.

    Args:
        policy: whose batch size is the number of observations.
        observations: a full batch.

    Raises:
        DoesNotFit: if the memory that the compiler asks for is not there.
    """
    model, weights = policy.model, policy.weights
    tokenizer, backbone, decoder = weights

    def compiled(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        program = jax.jit(function).lower(*args).compile()
        _check_memory(program.memory_analysis())
        return lambda *args: jax.block_until_ready(program(*args))

    def choose(decoder, context_kv, proprio, noise):
        sigma = jnp.full((len(proprio), 1), model.sampling.stop_sigma)
        return medoid(model.sample(decoder, context_kv, sigma, proprio, noise))

    def prepare(_: Any = None) -> Inputs:
        return jax.block_until_ready(policy.inputs(observations, with_future=False))

    def fetch(chunks: Any) -> np.ndarray:
        return policy.normalizer.unnormalize("actions", np.asarray(chunks))

    with policy.devices():
        i = prepare()
        act = compiled(lambda w, i: model.act(w, i), weights, i)
        chunks = act(weights, i)
        encode = compiled(model.encode, tokenizer, i.video)
        clean = encode(tokenizer, i.video)
        video = compiled(model.context, backbone, clean, i.text, i.video_noise)
        hidden = video(backbone, clean, i.text, i.video_noise)
        context = compiled(model.keys_values, decoder, hidden)
        kv = jax.eval_shape(model.keys_values, decoder, hidden)
        actions = compiled(choose, decoder, kv, i.proprio, i.action_noise)
    read = lambda _=None: context(decoder, hidden)  # noqa: E731
    return {
        "prepare": Part(prepare),
        "encode": Part(lambda _: encode(tokenizer, i.video)),
        "video": Part(lambda _: video(backbone, clean, i.text, i.video_noise)),
        "context": Part(read),
        # Keys and values can be most of the memory: they are made when they are needed.
        "actions": Part(lambda kv: actions(decoder, kv, i.proprio, i.action_noise), read),
        # An array that was fetched once remembers its numbers.
        "fetch": Part(fetch, lambda: jax.block_until_ready(chunks + 0)),
        "query": Part(lambda _: fetch(act(weights, prepare()))),
    }


def their_parts(peer: Any, observations: Sequence[Observation]) -> dict[str, Part]:
    """The same parts of a `mvjax.policy.torch_policy.TorchPolicy`."""
    done = peer.synchronised
    prepare, encode, video, context, actions, fetch = map(
        done, (peer.prepare, peer.encode, peer.context, peer.keys_values, peer.sample, peer.fetch)
    )
    text, video_noise, action_noise = peer.constants(observations)

    def query(_: Any = None) -> np.ndarray:
        frames, proprio = peer.prepare(observations)
        hidden = peer.context(peer.encode(frames), text, video_noise)
        return peer.fetch(peer.sample(peer.keys_values(hidden), proprio, action_noise))

    frames, proprio = prepare(observations)
    clean = encode(frames)
    hidden = video(clean, text, video_noise)
    chunks = actions(context(hidden), proprio, action_noise)
    return {
        "prepare": Part(lambda _: prepare(observations)),
        "encode": Part(lambda _: encode(frames)),
        "video": Part(lambda _: video(clean, text, video_noise)),
        "context": Part(lambda _: context(hidden)),
        "actions": Part(lambda kv: actions(kv, proprio, action_noise), lambda: context(hidden)),
        "fetch": Part(lambda _: fetch(chunks)),
        "query": Part(done(query)),
    }


def part_flops(policy: Policy) -> dict[str, float]:
    """Operations of every part for one query; parts that are not computed on the device lack."""
    model, sampling = policy.model, policy.model.sampling
    clip, backbone, decoder = model.clip, model.backbone.config, model.decoder.config
    text = policy.text_encoder.encode(["text"]).shape[1]
    video = partial(video_dit_flops, backbone, clip.latent_shape[:3], text)
    keys_values = 4.0 * decoder.num_blocks * clip.tokens * decoder.context_dim * decoder.width
    one_step = action_decoder_flops(decoder, clip.tokens, sampling.draws) - keys_values
    frames = (1, clip.observed_frames, clip.height, clip.width, 3)
    encode = jax.jit(model.encode).lower(policy.weights[0], jax.ShapeDtypeStruct(frames, np.uint8))
    flops = {
        # By the compiler: convolutions at the borders of a picture are not worth a formula.
        "encode": (encode.cost_analysis() or {}).get("flops", 0.0),
        "video": sampling.stop_step * video() + video(layers=model.layer),
        "context": keys_values,
        "actions": sampling.action_steps * one_step,
    }
    return flops | {"query": sum(flops.values())}


def _check_memory(needed: Any) -> None:
    """Raises DoesNotFit if a program needs more memory than a device has left.

    A machine without memory to spare would rather stop this program than refuse an allocation.
    """
    if needed is None:
        return
    wanted = needed.temp_size_in_bytes + needed.output_size_in_bytes
    stats = jax.local_devices()[0].memory_stats() or {}
    free = psutil.virtual_memory().available
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    if wanted > free:
        raise DoesNotFit(
            f"it needs {wanted / 2**30:.1f} GB beside what it is given, and "
            f"{free / 2**30:.1f} GB of {jax.devices()[0].device_kind} are free."
        )
