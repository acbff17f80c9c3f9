"""T5's encoder, text encoder of Cosmos-Predict2, in the layout of Hugging Face."""

import dataclasses

from mvjax.checkpoints.torch_weights.kind import Config, Hints, Kind
from mvjax.checkpoints.torch_weights.match import match
from mvjax.checkpoints.torch_weights.names_t5 import IGNORED, T5, TIED
from mvjax.checkpoints.torch_weights.rules import Rules
from mvjax.checkpoints.torch_weights.tensors import Tensors, WeightsError
from mvjax.models.parameters import Network
from mvjax.models.t5_encoder import T5Encoder, T5EncoderConfig


def _infer(layout: str, tensors: Tensors, hints: Hints) -> Config:
    published = hints.published or {}
    activation = published.get("feed_forward_proj", "relu")
    if activation != "relu":
        raise WeightsError(
            f"this T5 has feed_forward_proj={activation!r}; the encoder of Cosmos-Predict2 "
            "(t5-11b) has 'relu', and no other is known here."
        )
    found = match(tensors, T5)
    vocab_size, width = found.shape("token_embedding")
    buckets, heads = found.shape("relative_bias")
    encoder = T5EncoderConfig(
        vocab_size=vocab_size,
        width=width,
        num_blocks=found.blocks,
        num_heads=heads,
        head_dim=found.shape("blocks.q_proj.kernel")[1] // heads,
        mlp_dim=found.shape("blocks.layer1.kernel")[1],
        relative_buckets=buckets,
        max_distance=published.get("relative_attention_max_distance", 128),
        precision=hints.precision,
    )
    return {"text": {"dim": width}, "text_encoder": dataclasses.asdict(encoder)}


def _rules(layout: str, config: Config) -> Rules:
    return T5


def _network(config: Config) -> Network:
    sizes = T5EncoderConfig(**config["text_encoder"])
    return Network(lambda key: T5Encoder(sizes, key))


def _published(config: Config) -> Config:
    sizes = T5EncoderConfig(**config["text_encoder"])
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": sizes.vocab_size,
        "d_model": sizes.width,
        "num_layers": sizes.num_blocks,
        "num_heads": sizes.num_heads,
        "d_kv": sizes.head_dim,
        "d_ff": sizes.mlp_dim,
        "relative_attention_num_buckets": sizes.relative_buckets,
        "relative_attention_max_distance": sizes.max_distance,
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


TEXT = Kind(
    stage="text",
    title="T5 encoder",
    signatures={"diffusers": r"^encoder\.block\.|^shared\."},
    prefixed=(),
    dropped="|".join("^" + prefix.replace(".", r"\.") for prefix in IGNORED),
    aliases=TIED,
    infer=_infer,
    rules=_rules,
    network=_network,
    exports=dict.fromkeys(("nvidia", "mimic-video", "diffusers"), "diffusers"),
    published=_published,
)
