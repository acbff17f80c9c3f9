"""What a recording keeps of LIBERO, by the names and conventions that its users know.

LeRobot: "observation.state" is position 3 (m), rotation vector 3 (rad) and two fingers (m), and
pictures are turned by 180 degrees, as openpi and OpenVLA have them. HDF5: LIBERO's own names, with
pictures as OpenGL draws them, bottom row first; a row's observation is what preceded its action.
"""

import numpy as np

from mvjax.evaluation.suites.libero import CAMERA, WRIST_CAMERA, Libero


def make(task: str, height: int, width: int, jitter: int | None) -> Libero:
    """The simulator of a task; its camera never moves."""
    del jitter
    return Libero(task, height, width)


def state(simulator: Libero) -> np.ndarray:
    """Position, rotation vector and fingers: float32 [8]."""
    parts = (simulator.effector_position(), simulator.effector_rotation(), simulator.fingers())
    return np.concatenate(parts).astype(np.float32)


def row(simulator: Libero) -> dict[str, np.ndarray]:
    """A row of LIBERO's HDF5 files, but for the action: path below the demonstration -> value."""
    position, rotation = simulator.effector_position(), simulator.effector_rotation()
    fingers = simulator.fingers()
    pose = np.concatenate([position, simulator.effector_quaternion()])
    return {
        "states": simulator.state(),
        "robot_states": np.concatenate([fingers, pose]),
        "obs/agentview_rgb": simulator.render(CAMERA)[::-1, ::-1],
        "obs/eye_in_hand_rgb": simulator.render(WRIST_CAMERA)[::-1, ::-1],
        "obs/ee_pos": position,
        "obs/ee_ori": rotation,
        "obs/ee_states": np.concatenate([position, rotation]),
        "obs/gripper_states": fingers,
        "obs/joint_states": simulator.arm(),
    }


def scene(simulator: Libero) -> dict[str, str]:
    """What all demonstrations of a task have in common, for `data_pipelines.writers.hdf5.Scene`."""
    problem = simulator.scene.problem
    return {
        "name": simulator.scene.name,
        "instruction": simulator.scene.words,
        "env_name": problem,
        "problem_name": problem.lower(),
        "bddl_file": simulator.scene.bddl,
    }
