"""Joint training on a LIBERO suite: the video DiT's adapters and the decoder learn together.

    python -m launch.encode --config=configs/libero_joint.py:goal
    python -m launch.train --config=configs/libero_joint.py:goal --workdir=runs/libero_goal/joint

This is a recipe of mvjax, not a published one: the losses, rates and adapters of both published
stages, in one run. After the colon follow suite, share and cameras as for
configs/libero_action.py. To start from a trained stage 1, and from its decoder:

    python -m launch.train --config=configs/libero_joint.py:goal --workdir=runs/libero_goal/joint \
        --config.init_from=runs/libero_goal/video \
        --config.decoder_init_from=runs/libero_goal/action

`--config.flow.action_gradient=False` keeps the action loss away from the video model, which then
learns from video alone.

Data and weights: as for configs/libero_video.py, with the same records. Chips and memory:
docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import mimic_video


def get_config(arguments: str = "goal") -> ConfigDict:
    """20,000 steps of 64 clips.

    Args:
        arguments: suite, then share of the demonstrations and cameras if others than "full" and
            "single": e.g. "goal", "goal,tenth" or "goal,full,observed".
    """
    suite, share, cameras = mimic_video.libero_words(arguments)
    config = mimic_video.libero(suite, share, cameras)
    return mimic_video.joint_stage(config, steps=20_000, batch_size=64)
