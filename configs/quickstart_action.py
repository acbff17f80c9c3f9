"""Stage 2 of the quickstart: the tiny action decoder on the frozen backbone of stage 1.

    python -m launch.train --config=configs/quickstart_action.py --workdir=runs/quickstart/action

Two CPU cores, about two minutes, under 2 GB.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(size: str = "full") -> ConfigDict:
    """The published objective, with two action draws per backbone pass and half of the samples at
    the noise level the policy runs at (published: one draw, no such share).
    """
    config = quickstart.get_config(size)
    config.stage = "action"
    config.backbone = dict(checkpoint=config.get_ref("run_dir") + "/video", precision="float32")
    config.flow = dict(
        sigma_scale=4.0,
        sigma_tail=0.05,
        sampling_sigma_share=0.5,
        action_time_alpha=1.0,
        action_time_beta=1.0,
        action_draws=2,
        proprio_dropout=0.2,
        loss_scale=1.0,
    )
    if size != "smoke":
        config.training.steps = config.optimizer.decay_steps = 1200
    return config
