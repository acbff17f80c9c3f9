"""Two Franka arms with 16-joint hands, as in the mimic-video paper: 50 and 59 numbers.

Action: the effectors' future poses, each relative to its current one (2 x 9), and absolute joints
of the hands (2 x 16). Proprioception: the effectors' poses (2 x 9), the hands' joints (2 x 16), and
the right effector's pose relative to the left one (9); the paper's policy also reads previous
actions, which are parts such as dict(stream="left_hand_action", columns=..., shift=-0.1). The
control rate is not published.

Streams: left_eef_pose, right_eef_pose [n, 4, 4]; left_hand_action, right_hand_action,
left_hand_joints, right_hand_joints [n, 16].

RIGHT_ACTION and RIGHT_PROPRIO are for a robot with only the right arm: the same layout, padded.
"""

_HAND = tuple(range(16))
_LEFT_POSE, _RIGHT_POSE = dict(stream="left_eef_pose"), dict(stream="right_eef_pose")
_POSE = dict(represent="pose")
_NO_POSE, _NO_HAND = dict(pad=9), dict(pad=16)

ACTION = (
    dict(_LEFT_POSE, represent="relative_pose", base="left_eef_pose"),
    dict(_RIGHT_POSE, represent="relative_pose", base="right_eef_pose"),
    dict(stream="left_hand_action", columns=_HAND),
    dict(stream="right_hand_action", columns=_HAND),
)
PROPRIO = (
    _LEFT_POSE | _POSE,
    _RIGHT_POSE | _POSE,
    dict(stream="left_hand_joints", columns=_HAND),
    dict(stream="right_hand_joints", columns=_HAND),
    dict(_RIGHT_POSE, represent="relative_pose", base="left_eef_pose"),
)

RIGHT_ACTION = (_NO_POSE, ACTION[1], _NO_HAND, ACTION[3])
RIGHT_PROPRIO = (_NO_POSE, PROPRIO[1], _NO_HAND, PROPRIO[3], _NO_POSE)
