"""What the two stages on ALOHA share: the data and the sizes of the three views.

The high camera is predicted, and the cameras of both wrists are observed. Actions are 14 numbers at
50 Hz: joints relative to the present ones and absolute grippers, as openpi's ALOHA policies have
them (`aloha.DELTA_ACTION`).

Data: data/aloha, a LeRobot dataset with the features of the public ones, such as
lerobot/aloha_static_coffee (cam_high, cam_low, cam_left_wrist, cam_right_wrist; 480x640). Ten
windows a second of 50 episodes of 22 s are 11,000 windows, which make 30 GB of records. The low
camera is not used; add it to `cameras` to observe it, too. The simulator's datasets have the high
camera alone, as "top": there, set both cameras of `views` to "", for black pictures.

This is no published recipe, and it was never run on a public dataset. The tests encode a small one
that lerobot wrote.
"""

from ml_collections import ConfigDict

from configs import mimic_video
from data_pipelines.embodiments import aloha


def robot() -> ConfigDict:
    """3 s of actions, the first without delay."""
    cameras = {
        "left_wrist": "observation.images.cam_left_wrist",
        "right_wrist": "observation.images.cam_right_wrist",
    }
    dataset = dict(
        format="lerobot",
        path="data/aloha",
        embodiment="aloha",
        video="observation.images.cam_high",
        views=cameras,
        action=aloha.DELTA_ACTION,
        proprio=aloha.DELTA_PROPRIO,
        anchor_fps=10.0,
        weight=1.0,
    )
    config = mimic_video.shared(
        "runs/aloha", {"aloha": dataset}, dict(horizon=150, fps=50.0, shift=0.0), width=14
    )
    # Half the size of the scene: 600 tokens each beside its 19,200.
    config.clip.views = {name: dict(height=240, width=320) for name in cameras}
    return config
