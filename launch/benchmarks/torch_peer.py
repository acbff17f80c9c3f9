"""The same training step and policy in PyTorch, from diffusers' networks and our decoder.

The step does all the work of the JAX step: it draws and adds noise, computes the loss of the stage,
clips the gradient by its norm, updates with AdamW, and keeps a moving average where the JAX step
has one. But in stage 1 it always trains the whole network, even where the JAX run trains LoRA.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_pipelines.frames import resize_area
from launch.benchmarks.torch_networks import (
    TorchActionDecoder,
    TorchLinearTokenizer,
    TorchVideoDiT,
    TorchWanVAE,
    load_params,
)
from mvjax.experiment import Experiment
from mvjax.flow import TAIL_SIGMA, Trajectory, advance, published_noise, schedule
from mvjax.models.stand_ins import LinearTokenizer
from mvjax.models.video_dit import VideoDiTConfig
from mvjax.models.wan_vae import WanVAE
from mvjax.policy.observation import Observation
from mvjax.policy.policy import Policy
from mvjax.weights.kinds import decoder_rules
from mvjax.weights.names import Rules, video_dit_diffusers, wan_vae_diffusers

# --- The objectives of both stages, as modules that return a loss ---

Batch = dict[str, Tensor]


class TorchVideoObjective(nn.Module):
    """As `video_stage`, without adapters: the whole network learns.

    Attributes:
        trained: The network that learns.
        bfloat16: Whether it is computed under autocast.
    """

    def __init__(self, experiment: Experiment):
        super().__init__()
        model = experiment.video
        self.bfloat16 = model.dtype == "bfloat16"
        self.clip, self.flow = experiment.clip, experiment.config.flow
        self.trained = TorchVideoDiT(model)

    def compile_networks(self) -> None:
        """Uses `torch.compile`."""
        self.trained.compile_network()

    def forward(self, batch: Batch) -> Tensor:
        """The loss of latents [b, t, h, w, c] and text [b, l, d]."""
        x0 = batch["latents"]
        sigma, noise = random_sigma(x0, self.flow), torch.randn_like(x0)
        least, most = self.flow.min_condition_latents, self.clip.condition_latents
        number = torch.randint(least, most + 1, (len(x0), 1), device=x0.device)
        observed = first_frames(x0, number)
        noisy = x0 + sigma[..., None, None, None] * noise
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.bfloat16):
            velocity = self.trained(noisy, x0, sigma, observed, batch["text"])
        error = (velocity.float() - (noise - x0)) ** 2
        error = (1 - observed)[..., None, None, None] * error
        return self.flow.loss_scale * error.mean()


class TorchActionObjective(nn.Module):
    """As `action_stage`: the frozen backbone to block k, then the decoder, which learns."""

    def __init__(self, experiment: Experiment):
        super().__init__()
        config, decoder = experiment.config, experiment.decoder
        self.bfloat16 = decoder.dtype == "bfloat16"
        self.clip, self.flow = experiment.clip, config.flow
        self.sigma_max = config.sampler.sigma_max
        self.backbone = TorchVideoDiT(experiment.video, config.context_layer).requires_grad_(False)
        self.frozen_dtype = torch.float32
        if config.backbone.precision != "float32":
            self.frozen_dtype = torch.bfloat16
            self.backbone.to(torch.bfloat16)
        self.trained = TorchActionDecoder(decoder)

    def compile_networks(self) -> None:
        """Uses `torch.compile`."""
        self.backbone.compile_network()
        self.trained.compile_parts()

    def forward(self, batch: Batch) -> Tensor:
        """The loss of latents, text, actions, action_mask and proprio, as our loader gives them."""
        x0, draws, flow = batch["latents"], self.flow.action_draws, self.flow
        sigma = random_sigma(x0, flow)
        at_sampling = torch.rand_like(sigma) < flow.sampling_sigma_share
        sigma = torch.where(at_sampling, self.sigma_max, sigma)
        noisy = x0 + sigma[..., None, None, None] * torch.randn_like(x0)
        observed = first_frames(x0, self.clip.condition_latents)
        with torch.no_grad():
            text = batch["text"].to(self.frozen_dtype)
            context = self.backbone(noisy, x0, sigma, observed, text)
        actions, mask, proprio, sigma = (
            x.repeat_interleave(draws, dim=0)
            for x in (batch["actions"], batch["action_mask"], batch["proprio"], sigma)
        )
        beta = torch.distributions.Beta(flow.action_time_alpha, flow.action_time_beta)
        time = 0.999 * beta.sample((len(actions), 1)).to(x0.device) + 0.001
        noise = torch.randn_like(actions)
        dropped = (torch.rand_like(time[:, 0]) < flow.proprio_dropout).float()
        t = time[..., None]
        x = ((1 - t) * actions + t * noise) / ((1 - t) ** 2 + t**2).sqrt()
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.bfloat16):
            velocity = self.trained(
                proprio, x, time, sigma, self.trained.context_keys_values(context), dropped
            )
        error = mask * (velocity.float() - (noise - actions)) ** 2
        return flow.loss_scale * (error.sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)).mean()


def random_sigma(x0: Tensor, flow: Any) -> Tensor:
    """Noise levels of training [b, 1], as `mvjax.flow.sample_video_sigma`."""
    sigma = flow.sigma_scale * torch.randn(len(x0), 1, device=x0.device).exp()
    low, high = torch.tensor(TAIL_SIGMA).log().tolist()
    extreme = (low + (high - low) * torch.rand_like(sigma)).exp()
    return torch.where(torch.rand_like(sigma) < flow.sigma_tail, extreme, sigma)


def first_frames(latents: Tensor, number: Tensor | int) -> Tensor:
    """1 for the first `number` latent frames, 0 for the others: [b, t]."""
    frames = torch.arange(latents.shape[1], device=latents.device)
    return (frames < number).float().expand(len(latents), -1)


# --- The training step ---

OBJECTIVES = {"video": TorchVideoObjective, "action": TorchActionObjective}


class TorchStep:
    """A `Competitor` in PyTorch, on random data.

    Attributes:
        recomputes: Whether the blocks of the video DiT are computed again in the backward pass,
            since their activations did not fit.
    """

    name = "PyTorch"

    def __init__(self, experiment: Experiment, flops: float, compiled: bool):
        """Builds the networks and makes the first two steps.

        Args:
            experiment: A training run.
            flops: Of our step, so that both are measured alike.
            compiled: Use `torch.compile`.
        """
        _check_published(experiment.context_frames == "observed", experiment.video)
        start, config = time.perf_counter(), experiment.config
        self.flops, self.batch_size = flops, config.training.batch_size
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if experiment.stage not in OBJECTIVES:
            raise ValueError(
                f"PyTorch has no stage {experiment.stage!r}: measure mvjax alone with --notorch."
            )
        with self._device:
            self._objective = OBJECTIVES[experiment.stage](experiment)
        if compiled:
            self._objective.compile_networks()
        settings = config.optimizer
        self._parameters = list(self._objective.trained.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=settings.learning_rate,
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._clip_norm = settings.clip_norm
        self._ema_decay = config.training.ema_decay
        self._average = [p.detach().clone() for p in self._parameters if self._ema_decay]
        self._batch = {
            name: torch.randn(self.batch_size, *shape, device=self._device)
            for name, shape in experiment.batch_shapes.items()
        }
        if "action_mask" in self._batch:
            self._batch["action_mask"].fill_(1)
        self.recomputes = False
        try:
            self.run(2)
        except torch.OutOfMemoryError:
            if experiment.stage != "video":
                raise
            self.recomputes = True
        if self.recomputes:  # outside `except`, which holds on to the activations
            self._optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._objective.trained.net.enable_gradient_checkpointing()
            self.run(2)
        self.prepare_seconds = time.perf_counter() - start

    def run(self, steps: int) -> float:
        """As `Competitor.run`."""
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    @property
    def peak_mb(self) -> float | None:
        """As of `Competitor`."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated() / 2**20

    def _step(self) -> None:
        loss = self._objective(self._batch)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        if self._average:
            torch._foreach_lerp_(self._average, self._parameters, 1 - self._ema_decay)


def choose_attention(heads: int, tokens: int, head_dim: int) -> dict[str, float]:
    """Lets PyTorch use the faster of its attention kernels for Hopper and its like.

    Args:
        heads, tokens, head_dim: Of the self-attention, in bfloat16, batch 1.

    Returns:
        Milliseconds of "flash" and "cudnn", forward and backward; a kernel that does not run on
        this GPU is left out. Kernels that are left for short sequences are not affected.
    """
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    q, k, v = (
        torch.randn(1, heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    )
    times: dict[str, float] = {}
    for name, backend in backends.items():
        inputs = [x.requires_grad_() for x in (q, k, v)]
        try:
            with sdpa_kernel(backend):
                for count in (1, 5):  # the first one is not measured
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(count):
                        y = nn.functional.scaled_dot_product_attention(*inputs)
                        torch.autograd.grad(y, inputs, y)
                    torch.cuda.synchronize()
            times[name] = (time.perf_counter() - start) / count * 1e3
        except RuntimeError:
            continue
    if times:
        best = min(times, key=lambda name: times[name])
        torch.backends.cuda.enable_flash_sdp(best == "flash")
        torch.backends.cuda.enable_cudnn_sdp(best == "cudnn")
    return times


def _check_published(observed_only: bool, video_dit: VideoDiTConfig) -> None:
    if observed_only or video_dit.observed_latents:
        raise ValueError(
            "PyTorch computes what was published, with context_frames='all' and "
            "video_model.attention_to='all': use these, or measure mvjax alone with --notorch."
        )


# --- The policy, with our weights ---

Context = list[tuple[Tensor, Tensor]]


class TorchPolicy:
    """Computes actions as `Policy.act` does, always with the published noise.

    Everything is computed in bfloat16 where our policy's networks are.
    """

    def __init__(self, policy: Policy, compiled: bool):
        """Takes the sizes, the weights and the sampling of a policy.

        Args:
            policy: One without oracle. Where its weights are shapes, random ones are taken.
            compiled: Use `torch.compile` for the video DiT and the decoder.

        Raises:
            ValueError: If it is not one as published.
        """
        _check_published(policy.model.observed_only, policy.model.backbone.config)
        self._policy, self._model = policy, policy.model
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        backbone, decoder = self._model.backbone.config, self._model.decoder.config
        self._dtype = getattr(torch, backbone.dtype)
        tokenizer, backbone_params, decoder_params = policy.weights
        with self.device:  # initialising billions of numbers takes a CPU minutes
            self._tokenizer = self._on_device(_tokenizer(tokenizer))
            video_dits = [TorchVideoDiT(backbone, self._model.layer)]
            if self._model.sampling.stop_step:
                video_dits.append(TorchVideoDiT(backbone))
            self._decoder = TorchActionDecoder(decoder)
        self._pixels = getattr(torch, getattr(tokenizer, "config", decoder).dtype)
        if isinstance(tokenizer, WanVAE):
            self._tokenizer.to(self._pixels)
        for net in video_dits:
            rules = video_dit_diffusers(bool(backbone.text_projection_dim))
            _take(net.net, backbone_params, rules)
            self._on_device(net).to(self._dtype)
        _take(self._decoder, decoder_params, decoder_rules(decoder))
        self._decoder_dtype = getattr(torch, decoder.dtype)
        self._on_device(self._decoder).to(self._decoder_dtype)
        self._decoder.t_embedder["pair"].frequency = self._decoder.t_embedder["pair"].frequency.to(
            self.device
        )
        if compiled:
            for net in video_dits:
                net.compile_network()
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
        """Text embeddings, video noise and action noise, which a policy caches on the device."""
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
        """Latents [b, latent_frames, h/8, w/8, 16]; zeros for frames that are not given."""
        latents = self._tokenizer((frames.float() / 127.5 - 1).to(self._pixels)).float()
        missing = self._model.clip.latent_frames - latents.shape[1]
        return nn.functional.pad(latents, (0, 0) * 3 + (0, missing))

    def context(self, clean: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        """Hidden states after block k at the noise level of the stop step."""
        sigmas, coefficients = schedule(self._model.sampling.sigmas)
        here = Trajectory(noise * float(sigmas[0]), torch.zeros_like(noise))
        observed = first_frames(clean, self._model.clip.condition_latents)
        mask = observed[..., None, None, None]
        at = lambda i: torch.full((len(noise), 1), float(sigmas[i]), device=noise.device)  # noqa: E731
        k = self._model.sampling.stop_step
        for i in range(k):
            sigma = at(i)
            velocity = self._velocity(here.x, clean, sigma, observed, text).float()
            tau = (sigma / (1 + sigma))[..., None, None, None]
            x0 = mask * clean + (1 - mask) * ((1 - tau) * here.x - tau * velocity)
            here = advance(here, x0, map(float, coefficients[i]))
        return self._read(here.x, clean, at(k), observed, text)

    def keys_values(self, context: Tensor) -> Context:
        """Keys and values of the context for every block of the decoder."""
        return self._decoder.context_keys_values(context.to(self._decoder_dtype))

    def sample(self, context: Context, proprio: Tensor, noise: Tensor) -> Tensor:
        """Normalised chunks [b, horizon, dim]: of all draws, the one nearest to the others."""
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
        """Actions in environment units, on the host."""
        return self._policy.normalizer.unnormalize("actions", chunks.cpu().numpy())

    def synchronised(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function without gradients; it returns when the device has finished."""

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
    params = nnx.to_pure_dict(nnx.state(tokenizer))
    _take(module.net, params, wan_vae_diffusers(tokenizer.config))
    return module


def _take(module: nn.Module, params: Any, rules: Rules) -> None:
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        load_params(module, jax.device_get(params), rules)
