"""Franka Panda of LIBERO, 20 Hz: 10 numbers each, as in mimic-video (policy_io/libero.yaml).

Action: the simulator's own (position delta 3, rotation delta as a matrix's two rows 6, gripper 1:
-1 opens, 1 closes). Proprioception: effector position, rotation, first finger. No value is
interpolated.

ACTION and PROPRIO read the release's own episodes (format "mimic_episodes"):
eef_pos_ref_delta_lowdim, eef_rot_ref_delta_lowdim [n, 3, 3], gripper_action_lowdim; eef_pos_lowdim,
eef_rot_lowdim (xyzw), gripper_lowdim. HDF5_ACTION and HDF5_PROPRIO read LIBERO's own files (format
"robomimic_hdf5"): actions [n, 7]; obs/ee_pos, obs/ee_ori (axis-angle), obs/gripper_states.
REGENERATED_PROPRIO is for files in which obs/ee_ori is a quaternion (xyzw): those that mimic-video
regenerates.

A prediction restored by HDF5_ACTION is the simulator's action, except for the gripper's sign.
"""

ACTION = (
    dict(stream="eef_pos_ref_delta_lowdim", columns=(0, 1, 2)),
    dict(stream="eef_rot_ref_delta_lowdim", represent="rotation", rotation="matrix"),
    dict(stream="gripper_action_lowdim", columns=(0,)),
)
PROPRIO = (
    dict(stream="eef_pos_lowdim", columns=(0, 1, 2)),
    dict(stream="eef_rot_lowdim", represent="rotation", rotation="quaternion_xyzw"),
    dict(stream="gripper_lowdim", columns=(0,)),
)

HDF5_ACTION = (
    dict(stream="actions", columns=(0, 1, 2)),
    dict(stream="actions", columns=(3, 4, 5), represent="rotation", rotation="rotvec"),
    dict(stream="actions", columns=(6,)),
)


def _hdf5_proprio(rotation: str) -> tuple[dict, ...]:
    return (
        dict(stream="obs/ee_pos", columns=(0, 1, 2)),
        dict(stream="obs/ee_ori", represent="rotation", rotation=rotation),
        dict(stream="obs/gripper_states", columns=(0,)),
    )


HDF5_PROPRIO = _hdf5_proprio("rotvec")
REGENERATED_PROPRIO = _hdf5_proprio("quaternion_xyzw")

# Recordings of `launch.record`, and other LeRobot datasets in openpi's layout: action [n, 7];
# observation.state [n, 8]: position, axis-angle (0 to 2π), two fingers.
LEROBOT_ACTION = tuple(dict(part, stream="action") for part in HDF5_ACTION)
LEROBOT_PROPRIO = (
    dict(stream="observation.state", columns=(0, 1, 2)),
    dict(stream="observation.state", columns=(3, 4, 5), represent="rotation", rotation="rotvec"),
    dict(stream="observation.state", columns=(6,)),
)

CAMERAS = {
    "agentview": ("agentview", "agentview_rgb", "workspace_rgb", "image"),
    # The wrist is image2 in the LeRobot releases of LIBERO.
    "wrist": (
        "wrist",
        "wrist_image",
        "wrist_rgb",
        "eye_in_hand_rgb",
        "robot0_eye_in_hand",
        "image2",
    ),
}
