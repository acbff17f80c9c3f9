"""Stage 1 of the small LIBERO policy: the tiny video DiT (commands: configs/libero_small.py)."""

from ml_collections import ConfigDict

from configs import libero_small, quickstart_video


def get_config(size: str = "full") -> ConfigDict:
    """The quickstart's objective."""
    config = libero_small.get_config(size)
    config.stage = "video"
    config.flow = quickstart_video.get_config(size).flow
    return config
