"""Stage 2 of the small LIBERO policy: the tiny decoder (commands: configs/libero_small.py)."""

from ml_collections import ConfigDict

from configs import libero_small, quickstart_action


def get_config(argument: str = "full") -> ConfigDict:
    """The quickstart's objective."""
    config = libero_small.get_config(argument)
    objective = quickstart_action.get_config(libero_small.quickstart_size(argument))
    config.stage = "action"
    config.backbone = dict(checkpoint=config.get_ref("run_dir") + "/video", precision="float32")
    config.flow = objective.flow
    config.training.steps = config.optimizer.decay_steps = objective.training.steps
    return config
