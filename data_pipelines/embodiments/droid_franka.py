"""Franka Panda of DROID, 15 Hz: 10 numbers each.

Action: the commanded poses relative to the current one (position 3, rotation 6), and the commanded
gripper (0 closed, 1 open). Proprioception: the current pose and the gripper. The layout is that of
mimic-video's Bridge policies; DROID itself stores positions with Euler angles about fixed axes, and
a gripper that is 1 when closed.

Streams of the RLDS release (format "rlds"): steps/action_dict/cartesian_position and
steps/observation/cartesian_position [n, 6], steps/action_dict/gripper_position and
steps/observation/gripper_position [n, 1].
"""

_POSE = "steps/observation/cartesian_position"

ACTION = (
    dict(
        stream="steps/action_dict/cartesian_position",
        represent="relative_pose",
        base=_POSE,
        rotation="euler_xyz",
    ),
    dict(stream="steps/action_dict/gripper_position", represent="gripper", closed=1.0, open=0.0),
)
PROPRIO = (
    dict(stream=_POSE, represent="pose", rotation="euler_xyz"),
    dict(stream="steps/observation/gripper_position", represent="gripper", closed=1.0, open=0.0),
)

CAMERAS = {
    "exterior_1": ("exterior_image_1_left", "exterior_1_left"),
    "exterior_2": ("exterior_image_2_left", "exterior_2_left"),
    "wrist": ("wrist_image_left", "wrist_left"),
}
