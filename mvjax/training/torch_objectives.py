"""The objectives of both stages in PyTorch, as modules that return a loss."""

from typing import Any

import torch
from torch import Tensor, nn

from mvjax.checkpoints.torch_weights.torch_action_decoder import TorchActionDecoder
from mvjax.checkpoints.torch_weights.torch_networks import TorchVideoDiT
from mvjax.clip import Clip
from mvjax.flow.noise_levels import TAIL_SIGMA
from mvjax.models.build import action_decoder_config, video_dit_config

Batch = dict[str, Tensor]


class TorchVideoObjective(nn.Module):
    """As `video_stage`, without adapters: the whole network learns.

    Attributes:
        trained: what learns.
        bfloat16: whether it is computed under autocast.
    """

    def __init__(self, config: Any):
        super().__init__()
        model = video_dit_config(config)
        self.bfloat16 = model.dtype == "bfloat16"
        self.clip, self.flow = Clip(**config.clip), config.flow
        self.trained = TorchVideoDiT(model)

    def compile_networks(self) -> None:
        """Uses `torch.compile`."""
        self.trained.compile()

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
    """As `action_stage`: the frozen backbone to block k, then the decoder, which learns.

    Attributes:
        trained, bfloat16: as of `TorchVideoObjective`.
    """

    def __init__(self, config: Any):
        super().__init__()
        model, decoder = video_dit_config(config), action_decoder_config(config)
        self.bfloat16 = decoder.dtype == "bfloat16"
        self.clip, self.flow = Clip(**config.clip), config.flow
        self.sigma_max = config.sampler.sigma_max
        self.backbone = TorchVideoDiT(model, config.context_layer).requires_grad_(False)
        self.frozen_dtype = torch.float32
        if config.backbone.precision != "float32":
            self.frozen_dtype = torch.bfloat16
            self.backbone.to(torch.bfloat16)
        self.trained = TorchActionDecoder(decoder)

    def compile_networks(self) -> None:
        """Uses `torch.compile`."""
        self.backbone.compile()
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
    """Noise levels of training [b, 1], as `mvjax.flow.noise_levels.sample_video_sigma`."""
    sigma = flow.sigma_scale * torch.randn(len(x0), 1, device=x0.device).exp()
    low, high = torch.tensor(TAIL_SIGMA).log().tolist()
    extreme = (low + (high - low) * torch.rand_like(sigma)).exp()
    return torch.where(torch.rand_like(sigma) < flow.sigma_tail, extreme, sigma)


def first_frames(latents: Tensor, number: Tensor | int) -> Tensor:
    """1 for the first `number` latent frames, 0 for the others: [b, t]."""
    frames = torch.arange(latents.shape[1], device=latents.device)
    return (frames < number).float().expand(len(latents), -1)
