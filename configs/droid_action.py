"""Stage 2 on DROID: the action decoder on the frozen backbone, joint positions at 15 Hz.

    python -m launch.train --config=configs/droid_action.py --workdir=runs/droid/action

reads the backbone that configs/droid_video.py trains.

Data, sizes and what was never run: configs/droid.py, with the same records. The decoder and the
optimizer are those of mimic-video; steps and batch size are openpi's on DROID, as a starting point.
Chips and memory: docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import droid, mimic_video


def get_config() -> ConfigDict:
    """100,000 steps of 256 clips."""
    config = droid.robot()
    backbone = config.get_ref("run_dir") + "/video"
    return mimic_video.action_stage(config, steps=100_000, batch_size=256, backbone=backbone)
