"""Pretraining of the 2B video model on a mixture of human and robot video.

    python -m launch.encode --config=configs/pretrain_video.py
    python -m launch.train --config=configs/pretrain_video.py --workdir=runs/pretrain/video

continues the training of Cosmos-Predict2. From random weights:

    python -m launch.train --config=configs/pretrain_video.py:scratch \
        --workdir=runs/pretrain/scratch

First try the same data on a laptop, with tiny networks and small clips. This needs no weights, but
a tokenizer is fitted:

    python -m launch.encode --config=configs/pretrain_video.py:rehearsal --only=tokenizer
    python -m launch.encode --config=configs/pretrain_video.py:rehearsal
    python -m launch.train --config=configs/pretrain_video.py:rehearsal \
        --workdir=runs/rehearsal/video

All parameters are trained. Use the result like any other backbone:
`--config.init_from=runs/pretrain/video` in stage 1,
`--config.backbone.checkpoint=runs/pretrain/video` in stage 2.

This is not a published recipe. The learning rate (0.6 · 2^-14.5, falling to half of it), the weight
decay and the noise are those of NVIDIA's own training (its noise is σ = √latent frames ·
exp(N(ln 4, 1.2)), here with the spread 1). The rest is a starting point.

Weights: weights/cosmos2b (not for scratch), weights/wan_vae, weights/t5_11b (docs/weights.md).
Data: data/human, a folder of videos and captions; data/robot, a LeRobot v3.0 dataset, of which only
the video is read (docs/data.md). For more datasets, add entries to `config.datasets`. `weight` sets
the share of the windows that come from a dataset, whatever its size. Chips and memory:
docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import mimic_video
from mvjax.models.presets import VIDEO_DITS, video_section


def get_config(start: str = "cosmos") -> ConfigDict:
    """100,000 steps of 256 clips, two thirds of them human.

    Args:
        start: "cosmos", "scratch", or "rehearsal": twenty steps of 8 small clips from scratch.
    """
    if start not in ("cosmos", "scratch", "rehearsal"):
        raise ValueError(f"The start must be cosmos, scratch or rehearsal, got {start!r}.")
    video_only = dict(action="", proprio="")
    human = dict(
        format="video_folder",
        path="data/human",
        embodiment="human",
        video="video",
        anchor_fps=0.5,
        weight=2.0,
    )
    robot = dict(
        format="lerobot",
        path="data/robot",
        embodiment="robot",
        video="observation.images.image_0",
        anchor_fps=1.0,
        weight=1.0,
    )
    config = mimic_video.shared(
        "runs/pretrain",
        {"human": human | video_only, "robot": robot | video_only},
        dict(horizon=15, fps=5.0, shift=0.2),  # no dataset has actions
    )
    config.validation_share = 0.001
    steps = 100_000
    mimic_video.video_stage(config, steps=steps, batch_size=256)
    config.lora.rank = 0
    config.flow.update(sigma_scale=16.0, loss_scale=10.0)
    config.optimizer.update(
        learning_rate=0.6 * 2**-14.5,
        schedule="linear",
        warmup_steps=1000,
        decay_steps=steps,
        final_fraction=0.5,
        clip_norm=1.0,
    )
    config.training.sample_every = 5000
    if start != "cosmos":
        config.init_from = ""
        config.optimizer.update(
            learning_rate=1e-4, schedule="cosine", warmup_steps=5000, final_fraction=0.3
        )
        config.training.ema_decay = 0.9999
    if start == "rehearsal":
        config.run_dir = "runs/rehearsal"
        config.clip.update(height=64, width=64, future_frames=8)
        config.tokenizer, config.text_encoder = config.get_ref("run_dir") + "/tokenizer.npz", ""
        config.text.update(length=8, dim=64)
        config.video_model.update(video_section(VIDEO_DITS["tiny"]))
        config.mesh.update(data=-1, fsdp=1)
        config.training.update(steps=20, batch_size=8, log_every=1, sample_every=0)
    return config
