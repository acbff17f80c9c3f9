"""The same policy in PyTorch: diffusers' networks and our decoder's twin, with our weights."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from torch import Tensor, nn

from data_pipelines.transforms import resize_area
from mvjax.checkpoints.torch_weights.torch_action_decoder import TorchActionDecoder
from mvjax.checkpoints.torch_weights.torch_networks import (
    TorchLinearTokenizer,
    TorchVideoDiT,
    TorchWanVAE,
    decoder_rules,
    load_params,
    vae_rules,
    video_rules,
)
from mvjax.flow.sampler import evaluations, published_noise
from mvjax.models.linear_tokenizer import LinearTokenizer
from mvjax.models.wan_vae import WanVAE
from mvjax.policy.observation import Observation
from mvjax.policy.policy import Policy

Context = list[tuple[Tensor, Tensor]]


class TorchPolicy:
    """Answers queries as `Policy.plan` does, without its choice of noise: the published one.

    Everything is computed in bfloat16 where our policy's networks are.
    """

    def __init__(self, policy: Policy, compiled: bool):
        """Takes the sizes, the weights and the sampling of a policy.

        Args:
            policy: without oracle.
            compiled: whether to use `torch.compile` for the video DiT and the decoder.
        """
        self._policy, self._model = policy, policy.model
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        backbone, decoder = self._model.backbone.config, self._model.decoder.config
        self._dtype = getattr(torch, backbone.dtype)
        tokenizer, backbone_params, decoder_params = policy.weights
        self._tokenizer = self._on_device(_tokenizer(tokenizer))
        self._pixels = getattr(torch, getattr(tokenizer, "config", decoder).dtype)
        if isinstance(tokenizer, WanVAE):
            self._tokenizer.to(self._pixels)
        video_dits = [TorchVideoDiT(backbone, self._model.layer)]
        if self._model.sampling.stop_step:
            video_dits.append(TorchVideoDiT(backbone))
        for net in video_dits:
            load_params(net.net, backbone_params, video_rules(backbone))
            self._on_device(net).to(self._dtype)
        self._decoder = TorchActionDecoder(decoder)
        load_params(self._decoder, decoder_params, decoder_rules(decoder))
        self._decoder_dtype = getattr(torch, decoder.dtype)
        self._on_device(self._decoder).to(self._decoder_dtype)
        self._decoder.t_embedder["pair"].frequency = self._decoder.t_embedder["pair"].frequency.to(
            self.device
        )
        if compiled:
            for net in video_dits:
                net.compile()
            self._decoder.compile_parts()
        self._read, self._velocity = video_dits[0], video_dits[-1]

    def _on_device(self, module: nn.Module) -> nn.Module:
        return module.to(self.device).eval().requires_grad_(False)

    def prepare(self, observations: Sequence[Observation]) -> tuple[Tensor, Tensor]:
        """Pictures uint8 [b, frames, h, w, 3] and normalised proprioception, on the device."""
        clip, normalizer = self._model.clip, self._policy.normalizer
        frames = np.stack([resize_area(o.frames, clip.height, clip.width) for o in observations])
        proprio = normalizer.normalize("proprio", np.stack([o.proprio for o in observations]))
        return tuple(torch.from_numpy(x).to(self.device) for x in (frames, proprio))

    def constants(self, observations: Sequence[Observation]) -> tuple[Tensor, Tensor, Tensor]:
        """Text embeddings, video noise and action noise, which a policy keeps on the device."""
        sampling, sizes = self._model.sampling, self._model.decoder.config
        text = self._policy.text_encoder.encode([o.instruction for o in observations])
        shapes = (1, *self._model.clip.latent_shape), (sampling.draws, sizes.action_horizon)
        video = published_noise(sampling.seed, shapes[0])
        action = published_noise(sampling.seed, (*shapes[1], sizes.action_dim))[None]
        text, video, action = (torch.from_numpy(np.array(x)) for x in (text, video, action))
        each = len(observations)
        noise = video.expand(each, -1, -1, -1, -1), action.expand(each, -1, -1, -1)
        return text.to(self.device, self._dtype), *(x.to(self.device) for x in noise)

    def encode(self, frames: Tensor) -> Tensor:
        """Latents [b, latent_frames, h/8, w/8, 16]; those of frames that are not given are 0."""
        latents = self._tokenizer((frames.float() / 127.5 - 1).to(self._pixels)).float()
        missing = self._model.clip.latent_frames - latents.shape[1]
        return nn.functional.pad(latents, (0, 0) * 3 + (0, missing))

    def context(self, clean: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        """Hidden states after block k at the noise level of the stop step."""
        sigmas, coefficients = evaluations(self._model.sampling.sigmas)
        x, previous = noise * float(sigmas[0]), torch.zeros_like(noise)
        frames = torch.arange(clean.shape[1], device=clean.device)
        observed = (frames < self._model.clip.condition_latents).float().expand(len(clean), -1)
        mask = observed[..., None, None, None]
        at = lambda i: torch.full((len(x), 1), float(sigmas[i]), device=x.device)  # noqa: E731
        k = self._model.sampling.stop_step
        for i in range(k):
            sigma = at(i)
            velocity = self._velocity(x, clean, sigma, observed, text).float()
            tau = (sigma / (1 + sigma))[..., None, None, None]
            x0 = mask * clean + (1 - mask) * ((1 - tau) * x - tau * velocity)
            a, b, c = map(float, coefficients[i])
            x, previous = a * x + b * x0 + c * previous, x0
        return self._read(x, clean, at(k), observed, text)

    def keys_values(self, context: Tensor) -> Context:
        """Of every block of the decoder."""
        return self._decoder.context_keys_values(context.to(self._decoder_dtype))

    def sample(self, context: Context, proprio: Tensor, noise: Tensor) -> Tensor:
        """Chunks, normalised [b, horizon, dim]: of the draws, the one nearest to the others."""
        draws, steps = noise.shape[1], self._model.sampling.action_steps
        proprio = proprio.to(self._decoder_dtype).repeat_interleave(draws, dim=0)
        x = noise.flatten(0, 1)
        sigma = self._model.sampling.stop_sigma
        sigma = torch.full((len(x), 1), sigma, device=x.device)
        for t in np.cumsum([1.0] + [-1 / steps] * (steps - 1), dtype=np.float32).tolist():
            noisy = (x / ((1 - t) ** 2 + t**2) ** 0.5).to(self._decoder_dtype)
            time = torch.full_like(sigma, t)
            x = x - self._decoder(proprio, noisy, time, sigma, context).float() / steps
        chunks = x.view_as(noise)
        flat = chunks.flatten(2)
        distances = torch.linalg.vector_norm(flat[:, :, None] - flat[:, None], dim=-1)
        return chunks[torch.arange(len(chunks)), distances.sum(2).argmin(1)]

    def fetch(self, chunks: Tensor) -> np.ndarray:
        """In environment units, on the host."""
        return self._policy.normalizer.unnormalize("actions", chunks.cpu().numpy())

    def synchronised(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, without gradients, returning when the device has finished."""

        @torch.inference_mode()
        def run(*args: Any) -> Any:
            result = function(*args)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return result

        return run


def _tokenizer(tokenizer: Any) -> nn.Module:
    if isinstance(tokenizer, LinearTokenizer):
        return TorchLinearTokenizer(tokenizer)
    module = TorchWanVAE(tokenizer.config)
    params = jax.device_get(nnx.to_pure_dict(nnx.state(tokenizer)))
    load_params(module.net, params, vae_rules(tokenizer.config))
    return module
