"""The networks of mvjax in PyTorch, as the reference for tests and benchmarks.

The video DiT and the Wan VAE are those of diffusers. No package has the action decoder, so it is
implemented here, with the parameter names of mimic-video's files.
"""

import dataclasses
from collections import OrderedDict
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from data_pipelines.clip import PATCH
from launch.benchmarks.verify_weights import cosmos_transformer, wan_autoencoder
from mvjax.flow import CONDITION_SIGMA
from mvjax.models.action_decoder import (
    MAX_PERIOD,
    MIN_PERIOD,
    PROPRIO_TIME,
    ActionDecoderConfig,
    embedder_widths,
)
from mvjax.models.network import Params
from mvjax.models.video_dit import VideoDiTConfig
from mvjax.models.wan_vae import WanVAEConfig
from mvjax.training.checkpoint import leaf_paths
from mvjax.weights.kinds import video_sections
from mvjax.weights.names import Rules


class TorchVideoDiT(nn.Module):
    """diffusers' Cosmos transformer after the equivalent of `mvjax.flow.network_input`.

    Args:
        config: Configuration of the video DiT.
        layer: Number of blocks after which the hidden states are returned; None for the velocity
            of the whole network.
    """

    def __init__(self, config: VideoDiTConfig, layer: int | None = None):
        super().__init__()
        cut = {} if layer is None else {"num_layers": layer}
        self.layer, self.net = layer, cosmos_transformer(video_sections(config), **cut)
        if layer is not None:
            self.net.norm_out, self.net.proj_out = _Unchanged(), nn.Identity()

    def compile_network(self) -> None:
        """Uses `torch.compile`: on a GPU for the blocks, elsewhere for the network as a whole."""
        # The blocks are alike and compiled once. The whole would be unrolled, which takes minutes
        # for 28 blocks and gains little where a block is large.
        if torch.cuda.is_available():
            for block in self.net.transformer_blocks:
                block.compile()
        else:
            self.compile()

    def forward(
        self, noisy: Tensor, clean: Tensor, sigma: Tensor, observed: Tensor, text: Tensor
    ) -> Tensor:
        """Returns the velocity [b, t, h, w, c], or hidden states [b, t·h/2·w/2, width].

        Args:
            noisy: Noisy latents x0 + σ ε, [b, t, h, w, c].
            clean: Latents of which the observed frames are taken, [b, t, h, w, c].
            sigma: Noise level [b, 1].
            observed: 1 for conditioning frames [b, t].
            text: Embeddings [b, l, d].
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
        # diffusers has unpatched the tokens: each latent holds a quarter of the width.
        grid = out.unflatten(4, (w // PATCH, PATCH)).unflatten(3, (h // PATCH, PATCH))
        return grid.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)


class _Unchanged(nn.Module):
    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        return hidden_states


class TorchWanVAE(nn.Module):
    """diffusers' Wan VAE with normalised latents, channels last, as ours."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.net = wan_autoencoder({"tokenizer": dataclasses.asdict(config)})
        self.mean, self.std = config.latent_mean, config.latent_std

    def forward(self, video: Tensor) -> Tensor:
        """Encodes [b, 1 + 4k, h, w, 3] as float32 [b, 1 + k, h/8, w/8, c]."""
        latents = self.net.encode(video.movedim(-1, 1)).latent_dist.mode().movedim(1, -1).float()
        return (latents - latents.new_tensor(self.mean)) / latents.new_tensor(self.std)


class TorchLinearTokenizer(nn.Module):
    """The linear tokenizer: a matrix product per frame or group of frames."""

    def __init__(self, tokenizer: Any):
        super().__init__()
        for name, part in tokenizer._asdict().items():
            for leaf in ("mean", "encode"):
                array = torch.tensor(np.asarray(getattr(part, leaf)))
                self.register_buffer(f"{name}_{leaf}", array)

    def forward(self, video: Tensor) -> Tensor:
        """Encodes video [b, 1 + 4k, h, w, 3] in [-1, 1] as [b, 1 + k, h/8, w/8, 16]."""
        first = (_patches(video[:, :1], 1) - self.first_mean) @ self.first_encode
        groups = (_patches(video[:, 1:], 4) - self.group_mean) @ self.group_encode
        return torch.cat([first, groups], dim=1)


def _patches(video: Tensor, group: int) -> Tensor:
    b, t, h, w, c = video.shape
    x = video.reshape(b, t // group, group, h // 8, 8, w // 8, 8, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


def load_params(module: nn.Module, params: Params, rules: Rules) -> None:
    """Loads our weights into a PyTorch network.

    Args:
        module: The network; a video DiT with fewer blocks takes the weights of those.
        params: Our tree.
        rules: The table of the module's names.
    """
    leaves, needed = leaf_paths(params), module.state_dict().keys()
    state = {}
    for rule in rules:
        leaf = np.asarray(leaves[rule.ours.replace(".", "/")]).astype(np.float32)
        for i, block in enumerate(leaf if rule.stacked else leaf[None]):
            array = np.ascontiguousarray(rule.layout.to_torch(block))
            state[rule.name(i)] = torch.from_numpy(array)
    module.load_state_dict({name: state[name] for name in needed})


# --- The action decoder of mimic-video, under the names of its published files ---


KeysValues = tuple[Tensor, Tensor]
_EPS = 1e-6


class TorchActionDecoder(nn.Module):
    """As `mvjax.models.action_decoder.ActionDecoder`; loads the release's names without `net.`.

    Of the configuration, only the sizes are used.
    """

    def __init__(self, config: ActionDecoderConfig):
        super().__init__()
        d, tokens = config.width, config.proprio_horizon + config.action_horizon
        self.proprio_horizon = config.proprio_horizon
        self.ctx_norm = nn.LayerNorm(config.context_dim, _EPS)
        self.obs_embedder = _Embedder(config.proprio_dim, d)
        self.action_embedder = _Embedder(config.action_dim, d)
        self.obs_mask_token = nn.Parameter(torch.randn(1, 1, d) * d**-0.5)
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens, d) * d**-0.5)
        self.t_embedder = nn.ModuleDict({"pair": _PairTime(d, config.time_rank)})
        self.t_embedding_norm = nn.RMSNorm(config.time_rank, _EPS)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_blocks))
        self.final_layer = _FinalLayer(config)

    def compile_parts(self) -> None:
        """Compiles both methods with `torch.compile`."""
        self.compile()
        self.context_keys_values = torch.compile(self.context_keys_values)

    def context_keys_values(self, context: Tensor) -> list[KeysValues]:
        """Returns every block's keys and values of the context [b, m, context_dim]."""
        context = self.ctx_norm(context)
        return [block.cross_attn.keys_values(context) for block in self.blocks]

    def forward(
        self,
        proprio: Tensor,
        noisy_actions: Tensor,
        action_time: Tensor,
        video_sigma: Tensor,
        context: list[KeysValues],
        drop_proprio: Tensor | None = None,
    ) -> Tensor:
        """Returns the velocity [b·r, horizon, action_dim] of r draws per sample.

        Args:
            proprio: [b·r, proprio_horizon, proprio_dim].
            noisy_actions: Scaled actions [b·r, horizon, action_dim].
            action_time: Flow time [b·r, 1].
            video_sigma: Noise level of the video [b·r, 1].
            context: `context_keys_values` of b samples.
            drop_proprio: 1 where proprioception is replaced by the mask token [b·r].
        """
        p = self.proprio_horizon
        times = torch.full_like(action_time, PROPRIO_TIME).expand(-1, p)
        times = torch.cat([times, action_time.expand(-1, noisy_actions.shape[1])], dim=1)
        out = self.tokens(proprio, noisy_actions, times, video_sigma, context, drop_proprio)
        return out[:, p:]

    def tokens(
        self, proprio, noisy_actions, token_times, video_sigma, context, drop_proprio=None
    ) -> Tensor:
        """As `forward`, with a flow time per token [b·r, n], and the output of all n tokens."""
        state, actions = self.obs_embedder(proprio), self.action_embedder(noisy_actions)
        if drop_proprio is not None:
            drop = drop_proprio[:, None, None].to(state.dtype)
            state = (1 - drop) * state + drop * self.obs_mask_token
        x = torch.cat([state, actions], dim=1) + self.pos_embedding
        z, shared = self.t_embedder["pair"](token_times, video_sigma / (1 + video_sigma))
        embedding = self.t_embedding_norm(z)
        for block, keys_values in zip(self.blocks, context):
            x = block(x, embedding, shared, keys_values)
        return self.final_layer(x, embedding, shared)


class _Embedder(nn.Module):
    """Linear layers with GELU in between, times 1/√d."""

    def __init__(self, d_in: int, d: int):
        super().__init__()
        layers = [nn.Linear(*sizes) for sizes in pairwise(embedder_widths(d_in, d))]
        self.layers = nn.Sequential(layers[0])
        for layer in layers[1:]:
            self.layers.extend([nn.GELU(), layer])
        self.scale = d**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


class _PairTime(nn.Module):
    """z = B(φ_a) ⊙ C(φ_v) - b_B ⊙ b_C, and the modulation A(z) that all sublayers share."""

    def __init__(self, d: int, rank: int):
        super().__init__()
        self.proj_x, self.proj_c = nn.Linear(d, d), nn.Linear(d, d)
        self.B, self.C = nn.Linear(d, rank), nn.Linear(d, rank)
        self.A = nn.Linear(rank, 3 * d, bias=False)
        exponent = np.arange(d // 2) / (d // 2 - 1)
        period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** exponent
        # Not a buffer, which `module.to(torch.bfloat16)` would round.
        self.frequency = torch.as_tensor(2 * np.pi / period, device=self.A.weight.device)

    def forward(self, action_time: Tensor, video_time: Tensor) -> tuple[Tensor, Tensor]:
        """Maps flow times [b, n] and [b, 1] to [b, n, rank] and [b, n, 3 d]."""
        action = nn.functional.silu(self.proj_x(self._features(action_time)))
        video = nn.functional.silu(self.proj_c(self._features(video_time)))
        z = self.B(action) * self.C(video) - self.B.bias * self.C.bias
        return z, self.A(z)

    def _features(self, t: Tensor) -> Tensor:
        """Returns sines and cosines, computed in float64 and rounded to bfloat16 always."""
        angle = t.double()[..., None] * self.frequency
        features = torch.cat([angle.sin(), angle.cos()], dim=-1)
        return features.bfloat16().to(self.A.weight.dtype)


class _Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys."""

    def __init__(self, d: int, d_context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d_context, d, bias=False)
        self.v_proj = nn.Linear(d_context, d, bias=False)
        self.output_proj = nn.Linear(d, d, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(d // heads, _EPS) for _ in range(2))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Returns keys and values [b, heads, m, head_dim] of a context [b, m, d_context]."""
        keys = self.k_norm(self.k_proj(context).unflatten(-1, (self.heads, -1)))
        values = self.v_proj(context).unflatten(-1, (self.heads, -1))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        """Maps [b·r, n, d] to the same shape; a sample's r draws are queries to one context."""
        u = x.reshape(len(keys_values[0]), -1, x.shape[-1])
        queries = self.q_norm(self.q_proj(u).unflatten(-1, (self.heads, -1)))
        y = scaled_dot_product_attention(queries.transpose(1, 2), *keys_values)
        return self.output_proj(y.transpose(1, 2).flatten(2)).view_as(x)


class _Block(nn.Module):
    """Cross-attention to the video context, self-attention and MLP, modulated per token."""

    def __init__(self, config: ActionDecoderConfig):
        super().__init__()
        d, heads, hidden = config.width, config.num_heads, config.mlp_ratio * config.width
        self.cross_attn = _Attention(d, config.context_dim, heads)
        self.self_attn = _Attention(d, d, heads)
        layers = nn.Linear(d, hidden, bias=False), nn.GELU(), nn.Linear(hidden, d, bias=False)
        self.mlp = nn.Sequential(OrderedDict(zip(("layer1", "gelu", "layer2"), layers)))
        self.adaln_modulation_cross_attn = _modulation(config, 3)
        self.adaln_modulation_self_attn = _modulation(config, 3)
        self.adaln_modulation_mlp = _modulation(config, 3)

    def forward(
        self, x: Tensor, embedding: Tensor, shared: Tensor, keys_values: KeysValues
    ) -> Tensor:
        u, gate = _modulated(x, self.adaln_modulation_cross_attn(embedding) + shared)
        x = x + gate * self.cross_attn(u, keys_values)
        u, gate = _modulated(x, self.adaln_modulation_self_attn(embedding) + shared)
        x = x + gate * self.self_attn(u, self.self_attn.keys_values(u))
        u, gate = _modulated(x, self.adaln_modulation_mlp(embedding) + shared)
        return x + gate * self.mlp(u)


class _FinalLayer(nn.Module):
    """Modulated layer norm and the projection to actions."""

    def __init__(self, config: ActionDecoderConfig):
        super().__init__()
        self.linear = nn.Linear(config.width, config.action_dim, bias=False)
        self.adaln_modulation = _modulation(config, 2)

    def forward(self, x: Tensor, embedding: Tensor, shared: Tensor) -> Tensor:
        m = self.adaln_modulation(embedding)
        u, _ = _modulated(x, m + shared[..., : m.shape[-1]])
        return self.linear(u)


def _modulation(config: ActionDecoderConfig, chunks: int) -> nn.Sequential:
    """SiLU and two linear layers of rank `adaln_rank`."""
    return nn.Sequential(
        nn.SiLU(),
        nn.Linear(config.time_rank, config.adaln_rank, bias=False),
        nn.Linear(config.adaln_rank, chunks * config.width, bias=False),
    )


def _modulated(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns LN(x) (1 + scale) + shift, and the gate if there are three chunks."""
    shift, scale, *gate = m.split(x.shape[-1], dim=-1)
    return layer_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale) + shift, gate[0] if gate else None
