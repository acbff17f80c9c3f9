"""Stage 1 of mimic-video on a LIBERO suite: LoRA on Cosmos-Predict2 2B, as published.

    python -m launch.encode --config=configs/libero_video.py:goal
    python -m launch.train --config=configs/libero_video.py:goal --workdir=runs/libero_goal/video

After the colon follows the suite: goal, object or spatial. The released video models saw all 50
demonstrations per task, even where the decoder on top saw fewer. A share (half, tenth, one) may
follow nevertheless: `configs/libero_video.py:goal,tenth`.

Weights: weights/cosmos2b, weights/wan_vae, weights/t5_11b (docs/weights.md). Data: the release's
episodes of a suite in data/libero_<suite>; for other formats, see configs/mimic_video.py. A suite
is about 60,000 windows, which make 150 GB of records. Chips and memory: docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import mimic_video

STEPS = {"goal": 7_020, "object": 8_260, "spatial": 7_540}


def get_config(arguments: str = "goal") -> ConfigDict:
    """Steps of 32 clips, at a constant learning rate.

    Args:
        arguments: suite, or suite and share of the demonstrations, e.g. "goal,full".
    """
    suite, _, share = arguments.partition(",")
    config = mimic_video.libero(suite, share or "full")
    return mimic_video.video_stage(config, steps=STEPS[suite], batch_size=32)
