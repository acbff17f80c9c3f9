"""Stage 1 of mimic-video on a LIBERO suite: LoRA on Cosmos-Predict2 2B, as published.

    python -m launch.encode --config=configs/libero_video.py:goal
    python -m launch.train --config=configs/libero_video.py:goal --workdir=runs/libero_goal/video

After the colon follows the suite: goal, object or spatial. The released video models saw all 50
demonstrations per task, even where the decoder on top saw fewer. A share (half, tenth, one) may
follow nevertheless: `configs/libero_video.py:goal,tenth`. A third word adds the wrist camera, which
the published models do not have: "observed" as a view of 240x320, "tiled" beside the scene in one
picture.

    python -m launch.encode --config=configs/libero_video.py:goal,full,observed
    python -m launch.train --config=configs/libero_video.py:goal,full,observed \
        --workdir=runs/libero_goal_observed/video

Weights: weights/cosmos2b, weights/wan_vae, weights/t5_11b (docs/weights.md). Data: the release's
episodes of a suite in data/libero_<suite>; with two cameras data/libero_<suite>_regenerated, which
`launch.record --regenerate` makes of LIBERO's own demonstrations (docs/libero.md). For other
formats, see configs/mimic_video.py. A suite is about 60,000 windows, which make 150 GB of records.
Chips and memory: docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import mimic_video

STEPS = {"goal": 7_020, "object": 8_260, "spatial": 7_540}


def get_config(arguments: str = "goal") -> ConfigDict:
    """Steps of 32 clips, at a constant learning rate.

    Args:
        arguments: suite, then share of the demonstrations and cameras if others than "full" and
            "single": e.g. "goal", "goal,tenth" or "goal,full,observed".
    """
    suite, share, cameras = mimic_video.libero_words(arguments)
    config = mimic_video.libero(suite, share, cameras)
    return mimic_video.video_stage(config, steps=STEPS[suite], batch_size=32)
