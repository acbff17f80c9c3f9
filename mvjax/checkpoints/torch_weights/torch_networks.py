"""Our networks in PyTorch, for comparisons: diffusers' and the decoder, with weights of ours."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvjax.checkpoints.torch_weights.kind_vae import VAE
from mvjax.checkpoints.torch_weights.kind_video import VIDEO, video_sections
from mvjax.checkpoints.torch_weights.names_dit import action_decoder, video_dit_diffusers
from mvjax.checkpoints.torch_weights.names_wan_vae import wan_vae_diffusers
from mvjax.checkpoints.torch_weights.rules import Rules
from mvjax.checkpoints.torch_weights.torch_reference import cosmos_transformer
from mvjax.checkpoints.tree_match import leaf_paths
from mvjax.clip import PATCH
from mvjax.flow.video import CONDITION_SIGMA
from mvjax.models.action_decoder import ActionDecoderConfig
from mvjax.models.action_embedder import embedder_widths
from mvjax.models.param_tree import Params
from mvjax.models.video_dit import VideoDiTConfig
from mvjax.models.wan_vae_config import WanVAEConfig


class TorchVideoDiT(nn.Module):
    """diffusers' Cosmos transformer with what `mvjax.flow.video.network_input` does before it.

    Args:
        config: of the video DiT.
        layer: the block after which the hidden states are returned, and later ones left out; None
            for the velocity of the whole network.
    """

    def __init__(self, config: VideoDiTConfig, layer: int | None = None):
        super().__init__()
        settings = VIDEO.published(video_sections(config))
        if layer is not None:
            settings["num_layers"] = layer
        self.layer, self.net = layer, cosmos_transformer(settings)
        if layer is not None:
            self.net.norm_out, self.net.proj_out = _Unchanged(), nn.Identity()

    def forward(
        self, noisy: Tensor, clean: Tensor, sigma: Tensor, observed: Tensor, text: Tensor
    ) -> Tensor:
        """The velocity [b, t, h, w, c], or hidden states [b, t·h/2·w/2, width].

        Args:
            noisy: x0 + σ ε, [b, t, h, w, c].
            clean: latents, of which the observed frames are taken, [b, t, h, w, c].
            sigma: noise level [b, 1].
            observed: 1 for conditioning frames [b, t].
            text: embeddings [b, l, d].
        """
        b, t, h, w, _ = noisy.shape
        tau, mask = sigma / (1 + sigma), observed[..., None, None, None]
        latents = mask * clean + (1 - mask) * (1 - tau)[..., None, None, None] * noisy
        times = observed * (CONDITION_SIGMA / (1 + CONDITION_SIGMA)) + (1 - observed) * tau
        dtype = text.dtype
        (out,) = self.net(
            hidden_states=latents.movedim(-1, 1).to(dtype),
            timestep=times[:, None, :, None, None],
            encoder_hidden_states=text,
            condition_mask=mask.movedim(-1, 1).expand(b, 1, t, h, w).to(dtype),
            padding_mask=text.new_zeros(1, 1, h, w),
            fps=None,  # a number would scale the rotary positions; NVIDIA's network does not
            return_dict=False,
        )
        if self.layer is None:
            return out.movedim(1, -1)
        # The tokens have been put together to a picture, a quarter of the width at every latent.
        grid = out.unflatten(4, (w // PATCH, PATCH)).unflatten(3, (h // PATCH, PATCH))
        return grid.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)


class _Unchanged(nn.Module):
    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        return hidden_states


class TorchWanVAE(nn.Module):
    """diffusers' Wan VAE with the latents' statistics; encodes as ours, channels last."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        from diffusers import AutoencoderKLWan

        settings = VAE.published({"tokenizer": dataclasses.asdict(config)})
        self.net = AutoencoderKLWan(**{k: v for k, v in settings.items() if k[0] != "_"})
        self.mean, self.std = config.latent_mean, config.latent_std

    def forward(self, video: Tensor) -> Tensor:
        """Normalised posterior means, float32 [b, 1 + k, h/8, w/8, c], of [b, 1 + 4k, h, w, 3]."""
        latents = self.net.encode(video.movedim(-1, 1)).latent_dist.mode().movedim(1, -1).float()
        return (latents - latents.new_tensor(self.mean)) / latents.new_tensor(self.std)


class TorchLinearTokenizer(nn.Module):
    """The linear tokenizer: a product per frame or group of frames."""

    def __init__(self, tokenizer: Any):
        super().__init__()
        for name, part in tokenizer._asdict().items():
            for leaf in ("mean", "encode"):
                array = torch.tensor(np.asarray(getattr(part, leaf)))
                self.register_buffer(f"{name}_{leaf}", array)

    def forward(self, video: Tensor) -> Tensor:
        """Latents [b, 1 + k, h/8, w/8, 16] of video [b, 1 + 4k, h, w, 3] in [-1, 1]."""
        first = (_patches(video[:, :1], 1) - self.first_mean) @ self.first_encode
        groups = (_patches(video[:, 1:], 4) - self.group_mean) @ self.group_encode
        return torch.cat([first, groups], dim=1)


def _patches(video: Tensor, group: int) -> Tensor:
    b, t, h, w, c = video.shape
    x = video.reshape(b, t // group, group, h // 8, 8, w // 8, 8, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


def load_params(module: nn.Module, params: Params, rules: Rules) -> None:
    """Gives a PyTorch network our weights.

    Args:
        module: whose names the rules know. A video DiT that was cut short takes what it has.
        params: our tree.
        rules: names and layouts.
    """
    leaves, needed = leaf_paths(params), module.state_dict().keys()
    state = {}
    for rule in rules:
        leaf = np.asarray(leaves[rule.ours.replace(".", "/")]).astype(np.float32)
        blocks = leaf if "{i}" in rule.torch else leaf[None]
        for i, block in enumerate(blocks):
            array = np.ascontiguousarray(rule.layout.to_torch(block))
            state[rule.torch.replace("{i}", str(i))] = torch.from_numpy(array)
    module.load_state_dict({name: state[name] for name in needed})


def video_rules(config: VideoDiTConfig) -> Rules:
    """Of `TorchVideoDiT.net`."""
    return video_dit_diffusers(bool(config.text_projection_dim))


def decoder_rules(config: ActionDecoderConfig) -> Rules:
    """Of `TorchActionDecoder`."""
    dims = config.proprio_dim, config.action_dim
    return action_decoder(*(len(embedder_widths(dim, config.width)) - 1 for dim in dims))


def vae_rules(config: WanVAEConfig) -> Rules:
    """Of `TorchWanVAE.net`."""
    return wan_vae_diffusers(config)
