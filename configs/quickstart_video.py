"""Stage 1 of the quickstart: the tiny video DiT on robot and video-only clips.

    python -m launch.train --config=configs/quickstart_video.py --workdir=runs/quickstart/video

With LoRA instead of full training, starting from a trained backbone:

    python -m launch.train --config=configs/quickstart_video.py --workdir=runs/quickstart/lora \
        --config.lora.rank=8 --config.init_from=runs/quickstart/video

It takes about two minutes on two CPU cores, and under 2 GB.
"""

from ml_collections import ConfigDict

from configs import base, quickstart


def get_config(recipe: str = "full") -> ConfigDict:
    """The published objective; the σ scale is the published 4, the tail 5 %."""
    config = quickstart.get_config(recipe)
    base.video_stage(config, loss_scale=1.0)
    return config
