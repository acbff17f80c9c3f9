"""Stage 1 on ALOHA: LoRA on Cosmos-Predict2 2B, the high camera predicted, the wrists observed.

    python -m launch.encode --config=configs/aloha_video.py
    python -m launch.train --config=configs/aloha_video.py --workdir=runs/aloha/video

Data, sizes and what was never run: configs/aloha.py. The optimizer is that of mimic-video; steps
and batch size are those of its LIBERO, as a starting point. Weights: weights/cosmos2b,
weights/wan_vae, weights/t5_11b (docs/weights.md). Chips and memory: docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import aloha, mimic_video


def get_config() -> ConfigDict:
    """7,000 steps of 32 clips, at a constant learning rate."""
    return mimic_video.video_stage(aloha.robot(), steps=7_000, batch_size=32)
