"""Stage 1 of the small LIBERO policy: the tiny video DiT (commands: configs/libero_small.py)."""

from ml_collections import ConfigDict

from configs import libero_small, quickstart_video


def get_config(argument: str = "full") -> ConfigDict:
    """The quickstart's objective."""
    config = libero_small.get_config(argument)
    config.stage = "video"
    objective = quickstart_video.get_config(libero_small.quickstart_size(argument))
    config.flow = objective.flow
    return config
