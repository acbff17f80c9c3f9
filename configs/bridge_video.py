"""Stage 1 of mimic-video on BridgeData V2: LoRA on Cosmos-Predict2 2B, as published.

    python -m launch.encode --config=configs/bridge_video.py
    python -m launch.train --config=configs/bridge_video.py --workdir=runs/bridge/video

For full fine-tuning, set --config.lora.rank=0 and a smaller --config.optimizer.learning_rate.

Weights: weights/cosmos2b, weights/wan_vae, weights/t5_11b (docs/weights.md). Data: the release's
episodes in data/bridge; for other formats and more cameras, see configs/mimic_video.py. The whole
dataset is two million windows, which make 5 TB of records. To take every fifth window, set
`--config.datasets.bridge.anchor_fps=1`. Chips and memory: docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import mimic_video


def get_config() -> ConfigDict:
    """70,043 steps of 64 clips, at a constant learning rate."""
    return mimic_video.video_stage(mimic_video.bridge(), steps=70_043, batch_size=64)
