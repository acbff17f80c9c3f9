"""Joint training of the quickstart: the tiny video DiT and its action decoder learn together.

    python -m launch.train --config=configs/quickstart_joint.py --workdir=runs/quickstart/joint

It reads the quickstart's records: those of the robot teach both networks, the videos without
actions the video model alone. Its directory serves as that of a policy, and as a backbone:

    python -m launch.evaluate --checkpoint=runs/quickstart/joint --out=runs/quickstart/eval_joint
"""

from ml_collections import ConfigDict

from configs import base, quickstart


def get_config(recipe: str = "full") -> ConfigDict:
    """Both losses count alike. As in stage 2, two action draws per pass of the video model, and a
    share of the samples at the noise level the policy runs at; fewer than there, because the video
    model learns from them too.
    """
    config = quickstart.get_config(recipe)
    base.joint_stage(
        config,
        precision="float32",
        video_weight=1.0,
        action_weight=1.0,
        sampling_sigma_share=0.25,
        action_draws=2,
    )
    return config
