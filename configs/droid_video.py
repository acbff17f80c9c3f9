"""Stage 1 on DROID: LoRA on Cosmos-Predict2 2B, an exterior camera predicted, the wrist observed.

    python -m launch.encode --config=configs/droid_video.py
    python -m launch.train --config=configs/droid_video.py --workdir=runs/droid/video

Data, sizes and what was never run: configs/droid.py. The optimizer is that of mimic-video; steps
and batch size are those of its Bridge, as a starting point. Weights: weights/cosmos2b,
weights/wan_vae, weights/t5_11b (docs/weights.md). Chips and memory: docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import droid, mimic_video


def get_config() -> ConfigDict:
    """70,000 steps of 64 clips, at a constant learning rate."""
    return mimic_video.video_stage(droid.robot(), steps=70_000, batch_size=64)
