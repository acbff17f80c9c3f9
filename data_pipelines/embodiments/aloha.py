"""ALOHA, two ViperX arms, 50 Hz: 14 numbers each, in the robot's own units.

Per arm, left first, six joint angles (rad) and a gripper (0 closed, 1 open), all absolute; add
`represent="delta", base="observation.state"` for joints relative to the current ones. Streams of
the public LeRobot datasets (format "lerobot"): action, observation.state, both [n, 14].
"""

LEFT, RIGHT = tuple(range(7)), tuple(range(7, 14))

ACTION = (dict(stream="action", columns=LEFT), dict(stream="action", columns=RIGHT))
PROPRIO = (
    dict(stream="observation.state", columns=LEFT),
    dict(stream="observation.state", columns=RIGHT),
)

CAMERAS = {
    "cam_high": ("cam_high", "top"),  # "top" in the simulator's datasets
    "cam_low": ("cam_low",),
    "cam_left_wrist": ("cam_left_wrist",),
    "cam_right_wrist": ("cam_right_wrist",),
}
