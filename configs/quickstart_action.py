"""Stage 2 of the quickstart: the tiny action decoder on the frozen backbone of stage 1.

    python -m launch.train --config=configs/quickstart_action.py --workdir=runs/quickstart/action

It takes about two minutes on two CPU cores, and under 2 GB.
"""

from ml_collections import ConfigDict

from configs import base, quickstart


def get_config(recipe: str = "full") -> ConfigDict:
    """The published objective, with two action draws per backbone pass and half of the samples at
    the noise level the policy runs at (published: one draw, no such share).
    """
    config = quickstart.get_config(recipe)
    base.action_stage(
        config,
        config.get_ref("run_dir") + "/video",
        precision="float32",
        sampling_sigma_share=0.5,
        action_draws=2,
        loss_scale=1.0,
    )
    if config.size != "smoke":
        config.training.steps = config.optimizer.decay_steps = 1200
    return config
