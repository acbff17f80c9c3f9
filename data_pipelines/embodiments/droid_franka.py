"""Franka Panda of DROID, 15 Hz: poses with 10 numbers each, or joints with 8.

ACTION and PROPRIO are poses. Action: the commanded poses relative to the current one (position 3,
rotation 6), and the commanded gripper (0 closed, 1 open). Proprioception: the current pose and the
gripper. The layout is that of mimic-video's Bridge policies; DROID itself stores positions with
Euler angles about fixed axes, and a gripper that is 1 when closed.

JOINT_ACTION and JOINT_PROPRIO are joints. Action: the commanded positions of the seven joints (rad)
minus the present ones, and the commanded gripper. Proprioception: the present joints and gripper.
openpi trains its joint-position policies on DROID with the same differences. `vectors.restore`
makes them positions again, for a robot whose action space these are. openpi's gripper is DROID's.

Streams of the RLDS release (format "rlds"): steps/action_dict/ and steps/observation/
cartesian_position [n, 6], joint_position [n, 7] and gripper_position [n, 1].
"""

_POSE, _JOINTS = "steps/observation/cartesian_position", "steps/observation/joint_position"
_GRIPPER = dict(represent="gripper", closed=1.0, open=0.0)
_COMMANDED_GRIPPER = dict(_GRIPPER, stream="steps/action_dict/gripper_position")
_PRESENT_GRIPPER = dict(_GRIPPER, stream="steps/observation/gripper_position")

ACTION = (
    dict(
        stream="steps/action_dict/cartesian_position",
        represent="relative_pose",
        base=_POSE,
        rotation="euler_xyz",
    ),
    _COMMANDED_GRIPPER,
)
PROPRIO = (dict(stream=_POSE, represent="pose", rotation="euler_xyz"), _PRESENT_GRIPPER)

JOINT_ACTION = (
    dict(
        stream="steps/action_dict/joint_position",
        columns=tuple(range(7)),
        represent="delta",
        base=_JOINTS,
    ),
    _COMMANDED_GRIPPER,
)
JOINT_PROPRIO = (dict(stream=_JOINTS, columns=tuple(range(7))), _PRESENT_GRIPPER)

CAMERAS = {
    "exterior_1": ("exterior_image_1_left", "exterior_1_left"),
    "exterior_2": ("exterior_image_2_left", "exterior_2_left"),
    "wrist": ("wrist_image_left", "wrist_left"),
}
