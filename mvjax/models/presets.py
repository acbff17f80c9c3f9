"""Named sizes: the released models, and the tiny ones that train on a laptop."""

from mvjax.models.action_decoder import ActionDecoderConfig
from mvjax.models.video_dit import VideoDiTConfig

# Published LoRA targets (release, `configs/experiment/video2world.py`); `x_embedder` is
# `x_embedder.proj.1` there. The adaLN weights are trained in full beside them.
PUBLISHED_LORA_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "output_proj",
    "x_embedder",
    "linear_1",
    "linear_2",
    "layer1",
    "layer2",
)

VIDEO_DITS = {
    "tiny": VideoDiTConfig(
        width=128,
        num_blocks=4,
        num_heads=4,
        text_dim=64,
        adaln_rank=16,
        rope_ratio_thw=(1.0, 3.0, 3.0),
    ),
    "cosmos2b": VideoDiTConfig(
        width=2048,
        num_blocks=28,
        num_heads=16,
        text_dim=1024,
        adaln_rank=256,
        rope_ratio_thw=(1.0, 3.0, 3.0),
        dtype="bfloat16",
    ),
    "cosmos14b": VideoDiTConfig(
        width=5120,
        num_blocks=36,
        num_heads=40,
        text_dim=1024,
        adaln_rank=256,
        rope_ratio_thw=(20 / 24, 2.0, 2.0),
        dtype="bfloat16",
    ),
}

_RELEASED_DECODER = dict(
    width=1024,
    num_blocks=24,
    num_heads=8,
    context_dim=2048,
    adaln_rank=128,
    time_rank=1024,
    action_dim=10,
    proprio_dim=10,
    dtype="bfloat16",
)

ACTION_DECODERS = {
    "tiny": ActionDecoderConfig(
        width=128,
        num_blocks=3,
        num_heads=4,
        context_dim=128,
        adaln_rank=16,
        time_rank=128,
        action_dim=4,
        action_horizon=16,
        proprio_dim=4,
    ),
    "bridge": ActionDecoderConfig(action_horizon=15, **_RELEASED_DECODER),
    "libero": ActionDecoderConfig(action_horizon=60, **_RELEASED_DECODER),
}
