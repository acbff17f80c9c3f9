"""WidowX 250 of BridgeData V2, 5 Hz: 10 numbers each, as in mimic-video (policy_io/bridge.yaml).

Action: the future poses relative to the current one (position 3, rotation 6), and the gripper's
command (0 closed, 1 open); the published chunk starts 0.2 s ahead (`policy_io.action.shift`).
Proprioception: the current pose and the gripper. Between stored values rotations are interpolated
by slerp, positions and grippers linearly, as in the release.

ACTION and PROPRIO read the release's own episodes (format "mimic_episodes"): eef_pose_lowdim
[n, 4, 4], gripper_action_lowdim, gripper_state_lowdim. RAW_ACTION and RAW_PROPRIO read the folders
as they were recorded (format "bridge_raw"): eef_transform [n, 4, 4], gripper_action, gripper_state.
The release rotated the frame of the effector when it converted them, so its statistics and decoders
fit only its own episodes.
"""


def _vector(gripper: str, **pose) -> tuple[dict, ...]:
    return (
        pose | {"interpolation": "pose"},
        dict(stream=gripper, columns=(0,), interpolation="linear"),
    )


ACTION = _vector(
    "gripper_action_lowdim",
    stream="eef_pose_lowdim",
    represent="relative_pose",
    base="eef_pose_lowdim",
)
PROPRIO = _vector("gripper_state_lowdim", stream="eef_pose_lowdim", represent="pose")

RAW_ACTION = _vector(
    "gripper_action", stream="eef_transform", represent="relative_pose", base="eef_transform"
)
RAW_PROPRIO = _vector("gripper_state", stream="eef_transform", represent="pose")
