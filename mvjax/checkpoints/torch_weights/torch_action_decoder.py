"""The action decoder of mimic-video in PyTorch, under the names of its published files.

The measure of ours: in tests, where both compute the same numbers, and in benchmarks.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from mvjax.models.action_decoder import PROPRIO_TIME, ActionDecoderConfig
from mvjax.models.action_embedder import embedder_widths
from mvjax.models.pair_time import MAX_PERIOD, MIN_PERIOD

KeysValues = tuple[Tensor, Tensor]
EPS = 1e-6


class TorchActionDecoder(nn.Module):
    """As `mvjax.models.action_decoder.ActionDecoder`; loads the release without `net.`.

    Args:
        config: sizes; precision, kernel and rematerialisation are the caller's business.
    """

    def __init__(self, config: ActionDecoderConfig):
        super().__init__()
        d, tokens = config.width, config.proprio_horizon + config.action_horizon
        self.proprio_horizon = config.proprio_horizon
        self.ctx_norm = nn.LayerNorm(config.context_dim, EPS)
        self.obs_embedder = Embedder(config.proprio_dim, d)
        self.action_embedder = Embedder(config.action_dim, d)
        self.obs_mask_token = nn.Parameter(torch.randn(1, 1, d) * d**-0.5)
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens, d) * d**-0.5)
        self.t_embedder = nn.ModuleDict({"pair": PairTime(d, config.time_rank)})
        self.t_embedding_norm = nn.RMSNorm(config.time_rank, EPS)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.final_layer = FinalLayer(config)

    def compile_parts(self) -> None:
        """Uses `torch.compile` for both methods."""
        self.compile()
        self.context_keys_values = torch.compile(self.context_keys_values)

    def context_keys_values(self, context: Tensor) -> list[KeysValues]:
        """Every block's keys and values of the context [b, m, context_dim]: once per query."""
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
        """The velocity [b·r, horizon, action_dim] of r draws per sample; as ours.

        Args:
            proprio: [b·r, proprio_horizon, proprio_dim].
            noisy_actions: scaled, [b·r, horizon, action_dim].
            action_time: flow time [b·r, 1].
            video_sigma: noise level of the video [b·r, 1].
            context: of `context_keys_values`, for b samples.
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
        """As `forward`, with a flow time for every token [b·r, n]; the output of all n tokens."""
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


class Embedder(nn.Module):
    """Linears with GELU between, times 1/√d."""

    def __init__(self, d_in: int, d: int):
        super().__init__()
        layers = [nn.Linear(*sizes) for sizes in pairwise(embedder_widths(d_in, d))]
        self.layers = nn.Sequential(layers[0])
        for layer in layers[1:]:
            self.layers.extend([nn.GELU(), layer])
        self.scale = d**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, n, d_in] to [b, n, d]."""
        return self.layers(x) * self.scale


class PairTime(nn.Module):
    """z = B(φ_a) ⊙ C(φ_v) - b_B ⊙ b_C, and the modulation A(z) that all sublayers share."""

    def __init__(self, d: int, rank: int):
        super().__init__()
        self.proj_x, self.proj_c = nn.Linear(d, d), nn.Linear(d, d)
        self.B, self.C = nn.Linear(d, rank), nn.Linear(d, rank)
        self.A = nn.Linear(rank, 3 * d, bias=False)
        exponent = np.arange(d // 2) / (d // 2 - 1)
        period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** exponent
        # No buffer, which `module.to(torch.bfloat16)` would round.
        self.frequency = torch.as_tensor(2 * np.pi / period, device=self.A.weight.device)

    def forward(self, action_time: Tensor, video_time: Tensor) -> tuple[Tensor, Tensor]:
        """Maps flow times [b, n] and [b, 1] to [b, n, rank] and [b, n, 3 d]."""
        action = nn.functional.silu(self.proj_x(self._features(action_time)))
        video = nn.functional.silu(self.proj_c(self._features(video_time)))
        z = self.B(action) * self.C(video) - self.B.bias * self.C.bias
        return z, self.A(z)

    def _features(self, t: Tensor) -> Tensor:
        """Sines and cosines, computed in float64 and rounded to bfloat16 in every precision."""
        angle = t.double()[..., None] * self.frequency
        features = torch.cat([angle.sin(), angle.cos()], dim=-1)
        return features.bfloat16().to(self.A.weight.dtype)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys."""

    def __init__(self, d: int, d_context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d_context, d, bias=False)
        self.v_proj = nn.Linear(d_context, d, bias=False)
        self.output_proj = nn.Linear(d, d, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(d // heads, EPS) for _ in range(2))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values [b, heads, m, head_dim] of a context [b, m, d_context]."""
        keys = self.k_norm(self.k_proj(context).unflatten(-1, (self.heads, -1)))
        values = self.v_proj(context).unflatten(-1, (self.heads, -1))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        """Attends from [b·r, n, d]; the r draws of a sample are more queries to its context."""
        u = x.reshape(len(keys_values[0]), -1, x.shape[-1])
        queries = self.q_norm(self.q_proj(u).unflatten(-1, (self.heads, -1)))
        y = scaled_dot_product_attention(queries.transpose(1, 2), *keys_values)
        return self.output_proj(y.transpose(1, 2).flatten(2)).view_as(x)


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.layer1 = nn.Linear(d, hidden, bias=False)
        self.layer2 = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, n, d] to [b, n, d]."""
        return self.layer2(nn.functional.gelu(self.layer1(x)))


class Block(nn.Module):
    """Cross-attention to the video context, self-attention, MLP; modulated per token."""

    def __init__(self, config: ActionDecoderConfig):
        super().__init__()
        d, heads = config.width, config.num_heads
        self.cross_attn = Attention(d, config.context_dim, heads)
        self.self_attn = Attention(d, d, heads)
        self.mlp = MLP(d, config.mlp_ratio * d)
        self.adaln_modulation_cross_attn = modulation(config, 3)
        self.adaln_modulation_self_attn = modulation(config, 3)
        self.adaln_modulation_mlp = modulation(config, 3)

    def forward(
        self, x: Tensor, embedding: Tensor, shared: Tensor, keys_values: KeysValues
    ) -> Tensor:
        """Maps tokens [b·r, n, d] to the same shape."""
        u, gate = modulated(x, self.adaln_modulation_cross_attn(embedding) + shared)
        x = x + gate * self.cross_attn(u, keys_values)
        u, gate = modulated(x, self.adaln_modulation_self_attn(embedding) + shared)
        x = x + gate * self.self_attn(u, self.self_attn.keys_values(u))
        u, gate = modulated(x, self.adaln_modulation_mlp(embedding) + shared)
        return x + gate * self.mlp(u)


class FinalLayer(nn.Module):
    """Modulated layer norm and the projection to actions."""

    def __init__(self, config: ActionDecoderConfig):
        super().__init__()
        self.linear = nn.Linear(config.width, config.action_dim, bias=False)
        self.adaln_modulation = modulation(config, 2)

    def forward(self, x: Tensor, embedding: Tensor, shared: Tensor) -> Tensor:
        """Maps tokens [b, n, d] to [b, n, action_dim]."""
        m = self.adaln_modulation(embedding)
        u, _ = modulated(x, m + shared[..., : m.shape[-1]])
        return self.linear(u)


def modulation(config: ActionDecoderConfig, chunks: int) -> nn.Sequential:
    """SiLU and two linears through `adaln_rank`."""
    return nn.Sequential(
        nn.SiLU(),
        nn.Linear(config.time_rank, config.adaln_rank, bias=False),
        nn.Linear(config.adaln_rank, chunks * config.width, bias=False),
    )


def modulated(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor | None]:
    """LN(x) (1 + scale) + shift, and the gate where there are three chunks."""
    shift, scale, *gate = m.split(x.shape[-1], dim=-1)
    return layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift, gate[0] if gate else None
