"""ALOHA, two ViperX arms, 50 Hz: 14 numbers each, in the robot's own units.

Per arm, left first, six joint angles (rad) and a gripper (0 closed, 1 open). ACTION is absolute. In
DELTA_ACTION the joints are relative to the present ones and the grippers absolute, as in openpi's
ALOHA policies; openpi also turns some joints and rescales the grippers for the sake of its own
pretraining, which is not done here. Streams of the public LeRobot datasets (format "lerobot"):
action, observation.state, both [n, 14]; their cameras are observation.images.cam_high and so on.
"""

LEFT, RIGHT = tuple(range(7)), tuple(range(7, 14))

ACTION = (dict(stream="action", columns=LEFT), dict(stream="action", columns=RIGHT))
PROPRIO = (
    dict(stream="observation.state", columns=LEFT),
    dict(stream="observation.state", columns=RIGHT),
)


def _delta(arm: tuple[int, ...]) -> tuple[dict, ...]:
    joints = dict(stream="action", columns=arm[:6], represent="delta", base="observation.state")
    return joints, dict(stream="action", columns=arm[6:])


DELTA_ACTION, DELTA_PROPRIO = (*_delta(LEFT), *_delta(RIGHT)), PROPRIO

CAMERAS = {
    "cam_high": ("cam_high", "top"),  # "top" in the simulator's datasets
    "cam_low": ("cam_low",),
    "cam_left_wrist": ("cam_left_wrist",),
    "cam_right_wrist": ("cam_right_wrist",),
}
