"""The action decoder of mimic-video."""

from mvjax.checkpoints.torch_weights.kind import Config, Hints, Kind
from mvjax.checkpoints.torch_weights.match import match
from mvjax.checkpoints.torch_weights.names_dit import action_decoder
from mvjax.checkpoints.torch_weights.rules import Rules
from mvjax.checkpoints.torch_weights.tensors import Tensors, WeightsError
from mvjax.models.action_decoder import ActionDecoderConfig
from mvjax.models.action_embedder import embedder_widths
from mvjax.models.build import decoder_network, decoder_section
from mvjax.models.parameters import Network


def _infer(layout: str, tensors: Tensors, hints: Hints) -> Config:
    depths = (_depth(tensors, name) for name in ("obs_embedder", "action_embedder"))
    found = match(tensors, action_decoder(*depths))
    _, positions, width = found.shape("position")
    p = hints.proprio_horizon
    if not 1 <= p < positions:
        raise WeightsError(
            f"the decoder has {positions} positions, of which --proprio_horizon={p} cannot be "
            "proprioception; use a number from 1 (the releases) to less than that."
        )
    decoder = ActionDecoderConfig(
        width=width,
        num_blocks=found.blocks,
        num_heads=width // found.shape("blocks.self_attn.q_norm.scale")[0],
        context_dim=found.shape("context_norm.scale")[0],
        adaln_rank=found.shape("blocks.adaln_mlp.down.kernel")[1],
        time_rank=found.shape("t_embedding_norm.scale")[0],
        action_dim=found.shape("final_layer.linear.kernel")[1],
        action_horizon=positions - p,
        proprio_dim=found.shape("proprio_embedder.layer0.kernel")[0],
        proprio_horizon=p,
        mlp_ratio=found.shape("blocks.mlp.layer1.kernel")[1] // width,
        precision=hints.precision,
    )
    return {
        "video_model": {"width": decoder.context_dim},
        "policy_io": {
            "action": {"horizon": decoder.action_horizon, "dim": decoder.action_dim},
            "proprio": {"horizon": p, "dim": decoder.proprio_dim},
        },
        "decoder": decoder_section(decoder),
    }


def _depth(tensors: Tensors, embedder: str) -> int:
    """Linear layers of an embedder; at least one, which is then said to be missing."""
    weights = [n for n in tensors if n.startswith(embedder) and n.endswith(".weight")]
    return max(len(weights), 1)


def _decoder(config: Config) -> ActionDecoderConfig:
    action, proprio = config["policy_io"]["action"], config["policy_io"]["proprio"]
    return ActionDecoderConfig(
        **config["decoder"],
        context_dim=config["video_model"]["width"],
        action_dim=action["dim"],
        action_horizon=action["horizon"],
        proprio_dim=proprio["dim"],
        proprio_horizon=proprio["horizon"],
    )


def _rules(layout: str, config: Config) -> Rules:
    decoder = _decoder(config)
    return action_decoder(
        *(
            len(embedder_widths(dim, decoder.width)) - 1
            for dim in (decoder.proprio_dim, decoder.action_dim)
        )
    )


def _network(config: Config) -> Network:
    return decoder_network(_decoder(config))


ACTION = Kind(
    stage="action",
    title="action decoder",
    signatures={"mimic-video": r"^t_embedder\.pair\.|^obs_embedder\."},
    prefixed=("mimic-video",),
    dropped=r"(^|\.)_extra_state$|^accum_|^pos_embedder\.",
    aliases={},
    infer=_infer,
    rules=_rules,
    network=_network,
    exports={"mimic-video": "mimic-video"},
    published=None,
)
