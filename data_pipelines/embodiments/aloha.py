"""ALOHA, two ViperX arms, 50 Hz: 14 numbers each, as the robot takes and gives them.

Per arm, left first, six joint angles (rad) and a gripper (0 closed, 1 open). All are absolute;
replace a `represent` by "delta" with `base="observation.state"` for joints relative to the present
ones. Streams of the public LeRobot datasets (format "lerobot"): action, observation.state, both
[n, 14].
"""

LEFT, RIGHT = tuple(range(7)), tuple(range(7, 14))

ACTION = (dict(stream="action", columns=LEFT), dict(stream="action", columns=RIGHT))
PROPRIO = (
    dict(stream="observation.state", columns=LEFT),
    dict(stream="observation.state", columns=RIGHT),
)
