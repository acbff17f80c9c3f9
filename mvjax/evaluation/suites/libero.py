"""LIBERO (Liu et al. 2023): Panda arm, 20 Hz, by the protocol of mimic-video's release.

A seed below 50 selects one of the initial states in which LIBERO is evaluated, with the fixtures
of seed 0. Other seeds draw all placements, as for LIBERO's own demonstrations. The arm first holds
still for ten steps. Pictures are LIBERO's own turned by 180 degrees, as the published models expect
them; since LIBERO stores the bottom row first, this mirrors left and right. Actions are those of
robosuite's OSC_POSE: position delta (unit 5 cm), rotation delta as a rotation vector (unit
0.5 rad), gripper (-1 opens, 1 closes).

The simulator runs in a Python of its own, which `bash launch/libero.sh` creates; both Pythons
import this file. Tasks and scenes are in `libero_scene.py`, the expert in `libero_expert.py`.
"""

import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.embodiments.libero_panda import HDF5_ACTION
from data_pipelines.vectors import parse, restore
from mvjax.evaluation.suites.libero_scene import Scene, max_steps
from mvjax.evaluation.suites.mujoco_camera import MujocoCamera, frames_ahead

# As in `CAMERAS` of the embodiment -> in the simulator's model.
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
SETTLING_STEPS = 10  # as LIBERO and the release evaluate: objects fall into place first
STAY = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
_COLLISION_SHAPES = 0  # the geom group that LIBERO does not draw


class Libero:
    """A LIBERO task such as "spatial-3" (see `mvjax.evaluation.suites.suite.Simulator`).

    `height` and `width` of the pictures are in pixels.
    """

    control_hz = 20
    action_dim = 7

    def __init__(self, task: str, height: int = 480, width: int = 640) -> None:
        self.task = task
        self.max_steps = max_steps(task)
        self.scene = Scene(task)  # about five seconds
        import mujoco  # after the scene has selected how to render: MuJoCo reads that on import

        self.instruction = self.scene.instruction
        self._env = self.scene.env
        self._robot = self._env.robots[0]
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        self._pictures = MujocoCamera(self._model, height, width)
        self._shapes = mujoco.MjvOption()
        self._shapes.geomgroup[_COLLISION_SHAPES] = 0
        self._expert = None

    def reset(self, seed: int) -> None:
        """Start from initial state `seed`, or from a drawn placement; then hold still."""
        states = self.scene.initial_states
        if seed < len(states):
            self.restart(states[seed])
        else:
            self._place(seed)
        for _ in range(SETTLING_STEPS):
            self.step(STAY)

    def restart(self, state: np.ndarray) -> None:
        """Start from a flattened simulator state [s], without holding still."""
        # The release seeds once per process: its fixtures depend on the episodes before.
        self._place(0)
        self._env.sim.set_state_from_flattened(state)
        self._env.sim.forward()
        self._env._check_success()
        self._env._post_process()

    def _place(self, seed: int) -> None:
        """Draws all placements."""
        from robosuite.utils.errors import RandomizationError

        np.random.seed(seed)  # LIBERO draws from numpy's global generator
        self._expert = None
        gripper = self._robot.gripper  # robosuite's soft reset leaves its action as it was
        gripper.current_action = np.zeros(gripper.dof)
        while True:
            try:
                self._env.reset()
                return
            except RandomizationError:
                pass  # an object did not find room: draw again

    def step(self, action: np.ndarray) -> bool:
        """Apply an OSC_POSE action [7] for 50 ms; True when the task is done."""
        _, _, done, _ = self._env.step(np.asarray(action, np.float64))
        return bool(done)

    def render(self, camera: str) -> np.ndarray:
        """The camera "agentview" or "wrist" as the release turns it: uint8 [height, width, 3]."""
        picture = self._pictures.draw(self._data, CAMERAS[camera], self._shapes)
        # LIBERO stores the bottom row first: turning by 180 degrees mirrors left and right.
        return np.ascontiguousarray(picture[:, ::-1])

    def proprio(self) -> np.ndarray:
        """Position (m), two rows of the rotation, first finger (m): float32 [10]."""
        rotation = self._hand().xmat.reshape(3, 3)
        parts = (self.effector_position(), rotation[:2].reshape(6), self.fingers()[:1])
        return np.concatenate(parts).astype(np.float32)

    def effector_position(self) -> np.ndarray:
        """Between the finger tips, in metres: float64 [3]."""
        return self._data.site_xpos[self._robot.eef_site_id].copy()

    def effector_quaternion(self) -> np.ndarray:
        """Of the hand, xyzw: float64 [4]."""
        return np.roll(self._hand().xquat, -1)

    def fingers(self) -> np.ndarray:
        """Joint positions in metres, 0.04 and -0.04 when open: float64 [2]."""
        return self._data.qpos[self._robot._ref_gripper_joint_pos_indexes].copy()

    def arm(self) -> np.ndarray:
        """Joint angles in radians: float64 [7]."""
        return self._data.qpos[self._robot._ref_joint_pos_indexes].copy()

    def effector_rotation(self) -> np.ndarray:
        """Of the hand, as LIBERO's files have it: `axis_angle`, float64 [3]."""
        return axis_angle(np.roll(self._hand().xquat, -1))

    def state(self) -> np.ndarray:
        """The flattened simulator state, as LIBERO stores it: time, positions, velocities."""
        return np.concatenate([[self._data.time], self._data.qpos, self._data.qvel])

    def expert_action(self) -> np.ndarray:
        """The scripted expert's action: float32 [7]."""
        return self._ready_expert().act()

    def lookahead(self, steps: int, stride: int, cameras: Sequence[str]) -> dict[str, np.ndarray]:
        """The future under the expert: camera -> uint8 [steps // stride, height, width, 3]."""
        from mvjax.evaluation.suites.libero_physics import Snapshot

        snapshot = Snapshot(self._env, self._ready_expert())
        frames = frames_ahead(self, steps, stride, cameras)
        self._expert = snapshot.restore()
        return frames

    def close(self) -> None:
        """Free the renderer; the simulator cannot be used afterwards."""
        self._pictures.close()
        self._env.close()

    # What recordings store, in LIBERO's names and conventions.

    def lerobot_state(self) -> np.ndarray:
        """Position 3 (m), axis-angle 3 (rad), fingers 2 (m): float32 [8]."""
        parts = (self.effector_position(), self.effector_rotation(), self.fingers())
        return np.concatenate(parts).astype(np.float32)

    def hdf5_row(self) -> dict[str, np.ndarray]:
        """A row of LIBERO's own files without the action: path in the demonstration -> value.

        Pictures are as OpenGL draws them, bottom row first.
        """
        position, rotation = self.effector_position(), self.effector_rotation()
        fingers = self.fingers()
        return {
            "states": self.state(),
            "robot_states": np.concatenate([fingers, position, self.effector_quaternion()]),
            "obs/agentview_rgb": self.render("agentview")[::-1, ::-1],
            "obs/eye_in_hand_rgb": self.render("wrist")[::-1, ::-1],
            "obs/ee_pos": position,
            "obs/ee_ori": rotation,
            "obs/ee_states": np.concatenate([position, rotation]),
            "obs/gripper_states": fingers,
            "obs/joint_states": self.arm(),
        }

    def hdf5_scene(self) -> dict[str, str]:
        """The metadata of a task's file, for `data_pipelines.writers.Scene`."""
        problem = self.scene.problem
        return {
            "name": self.scene.name,
            "instruction": self.scene.sentence,
            "env_name": problem,
            "problem_name": problem.lower(),
            "bddl_file": self.scene.bddl,
        }

    def _ready_expert(self):
        from mvjax.evaluation.suites.libero_expert import PickAndPlace

        if self._expert is None:
            goal = self._env.parsed_problem["goal_state"]
            self._expert = PickAndPlace(self._model, self._data, goal)
        return self._expert

    def _hand(self):
        return self._data.body(self._robot.robot_model.eef_name)


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """The axis times the angle (0 to 2π) of a quaternion xyzw, by robosuite's `quat2axisangle`.

    LIBERO's demonstrations and openpi's clients use it, too. Since the hand points down, its angle
    passes through π all the time. A rotation vector, which is at most π long, jumps there to its
    opposite; this one goes on.
    """
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    length = np.sqrt(1.0 - w * w)
    if math.isclose(length, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3], np.float64) * 2.0 * math.acos(w) / length


# A policy's actions as LIBERO's simulator takes them.

_ACTION = parse(HDF5_ACTION, "action")


def libero_commands(chunk: np.ndarray, proprio: np.ndarray) -> np.ndarray:
    """Converts a policy's chunk (`data_pipelines/embodiments/libero_panda.py`) to OSC_POSE actions.

    Args:
        chunk: float32 [h, 10]: position delta 3, two rows of the rotation delta 6, gripper.
        proprio: unused, since OSC_POSE's deltas are relative to the present pose, too.

    Returns:
        float32 [h, 7]; the gripper either opens (-1) or closes (1).
    """
    del proprio
    actions = restore(_ACTION, chunk, {})["actions"]
    actions[:, 6] = np.where(actions[:, 6] > 0, 1, -1)
    return actions.astype(np.float32)


# The Python of LIBERO's own environment (`bash launch/libero.sh`).

PYTHON_VARIABLE = "MVJAX_LIBERO_PYTHON"
_ROOT = Path(__file__).parents[3]


def libero_python() -> Path:
    """Returns LIBERO's Python; FileNotFoundError if there is none yet."""
    given = os.environ.get(PYTHON_VARIABLE)
    python = Path(given) if given else _ROOT / ".venv-libero" / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(
            f"LIBERO needs an environment of its own, but there is no {python}: create it with "
            f"`bash launch/libero.sh`, or set {PYTHON_VARIABLE}."
        )
    return python


def in_libero_python(module: str) -> None:
    """Replaces this process by `python -m module` in LIBERO's Python, with the same arguments.

    Returns if LIBERO is installed in this Python already.
    """
    if importlib.util.find_spec("libero") is None:
        python = str(libero_python())
        path = {"PYTHONPATH": str(_ROOT)}
        os.execve(python, [python, "-m", module, *sys.argv[1:]], {**os.environ, **path})
