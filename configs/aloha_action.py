"""Stage 2 on ALOHA: the action decoder on the frozen backbone, both arms at 50 Hz.

    python -m launch.train --config=configs/aloha_action.py --workdir=runs/aloha/action

reads the backbone that configs/aloha_video.py trains.

Data, sizes and what was never run: configs/aloha.py, with the same records. The decoder and the
optimizer are those of mimic-video; steps and batch size are those of its LIBERO, as a starting
point. Chips and memory: docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import aloha, mimic_video


def get_config() -> ConfigDict:
    """50,000 steps of 128 clips."""
    config = aloha.robot()
    backbone = config.get_ref("run_dir") + "/video"
    return mimic_video.action_stage(config, steps=50_000, batch_size=128, backbone=backbone)
