"""LIBERO (Liu et al. 2023): Panda arm, 20 Hz, by the protocol of mimic-video's release.

A seed below 50 is the number of an initial state in which LIBERO is evaluated; fixtures are placed
as by seed 0. Other seeds place everything anew, as for LIBERO's own demonstrations. The arm holds
still for ten steps first. Pictures are LIBERO's own turned by 180 degrees, as
the published models expect them; since LIBERO's are stored bottom row first, that exchanges left
and right. Actions are those of robosuite's OSC_POSE: position delta (unit 5 cm), rotation delta as
a rotation vector (unit 0.5 rad), gripper (-1 opens, 1 closes).
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np

from data_pipelines.embodiments.libero_panda import HDF5_ACTION
from data_pipelines.vectors import parse, restore
from mvjax.evaluation.suites.libero_scene import Scene, max_steps

CAMERA, WRIST_CAMERA = "agentview", "robot0_eye_in_hand"
SETTLING_STEPS = 10
STAY = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
_COLLISION_SHAPES = 0  # the geom group that LIBERO does not draw


class Libero:
    """One LIBERO task (see `mvjax.evaluation.worker.Simulator` for the methods).

    Args:
        task: such as "spatial-3" (`libero_tasks`).
        height: of the pictures, pixels.
        width: of the pictures, pixels.

    Raises:
        ValueError, ModuleNotFoundError, FileNotFoundError: see `Scene`.
        RuntimeError: at the first picture, if no OpenGL can be found.
    """

    control_hz = 20
    action_dim = 7

    def __init__(self, task: str, height: int = 480, width: int = 640) -> None:
        """Builds the environment, about five seconds."""
        self.task = task
        self.max_steps = max_steps(task)
        self.scene = Scene(task)
        self.instruction = self.scene.instruction
        self._env = self.scene.env
        self._robot = self._env.robots[0]
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        self._size = (height, width)
        self._renderer, self._shapes = None, None
        self._expert = None
        # Software OpenGL spends most of its time on shadows and multisampling: both are off (before
        # the drawing context is made, or it has no effect). Pictures must not mix the two settings.
        self._model.vis.quality.offsamples = 0
        self._model.vis.quality.shadowsize = 0
        self._model.vis.global_.offheight, self._model.vis.global_.offwidth = self._size

    def reset(self, seed: int) -> None:
        """Start from initial state `seed`, or from a drawn placement, and settle."""
        states = self.scene.initial_states
        if seed < len(states):
            self.restart(states[seed])
        else:
            self._place(seed)
        for _ in range(SETTLING_STEPS):
            self.step(STAY)

    def restart(self, state: np.ndarray) -> None:
        """Start from a flattened simulator state [s], without settling."""
        # The release seeds once per process, so its fixtures depend on which episodes came before.
        self._place(0)
        self._env.sim.set_state_from_flattened(state)
        self._env.sim.forward()
        self._env._check_success()
        self._env._post_process()

    def _place(self, seed: int) -> None:
        """Draws where everything is."""
        from robosuite.utils.errors import RandomizationError

        np.random.seed(seed)  # LIBERO draws from numpy's global generator
        self._expert = None
        gripper = self._robot.gripper  # the one thing that a soft reset leaves as it was
        gripper.current_action = np.zeros(gripper.dof)
        while True:
            try:
                self._env.reset()
                return
            except RandomizationError:
                pass  # things did not find room; the next draw may do better

    def step(self, action: np.ndarray) -> bool:
        """Apply an OSC_POSE action [7] for 50 ms; True when the task is done."""
        action = np.asarray(action, np.float64)
        if action.shape != (7,):
            raise ValueError(f"a LIBERO action has shape [7], got {list(action.shape)}")
        _, _, done, _ = self._env.step(action)
        return bool(done)

    def render(self, camera: str = CAMERA) -> np.ndarray:
        """A camera as the release turns it: uint8 [height, width, 3]."""
        import mujoco

        if self._renderer is None:
            try:
                self._renderer = mujoco.Renderer(self._model, *self._size)
            except Exception as error:  # every GL backend raises its own kind
                raise RuntimeError(
                    f"MuJoCo cannot draw here ({error}): install a software OpenGL (Debian: "
                    "libegl1 libgl1-mesa-dri, or libosmesa6) and set MUJOCO_GL=egl or "
                    "MUJOCO_GL=osmesa"
                ) from error
            self._shapes = mujoco.MjvOption()
            self._shapes.geomgroup[_COLLISION_SHAPES] = 0
        self._renderer.update_scene(self._data, camera, self._shapes)
        flags = self._renderer.scene.flags  # update_scene sets them anew every time
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return np.ascontiguousarray(self._renderer.render()[:, ::-1])

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
        """Of the hand, as a rotation vector in radians: float64 [3]."""
        import mujoco

        rotation = np.zeros(3)
        mujoco.mju_quat2Vel(rotation, self._hand().xquat, 1.0)
        return rotation

    def state(self) -> np.ndarray:
        """The flattened simulator state, as LIBERO stores it: time, positions, velocities."""
        return np.concatenate([[self._data.time], self._data.qpos, self._data.qvel])

    def expert_action(self) -> np.ndarray:
        """The scripted expert's action: float32 [7]."""
        self._plan()
        return self._expert.act()

    def lookahead(self, steps: int, stride: int) -> np.ndarray:
        """Frames `stride`, `2 * stride`, ... up to `steps` control steps ahead under the expert."""
        from mvjax.evaluation.suites.libero_physics import Snapshot

        self._plan()
        snapshot = Snapshot(self._env, self._expert)
        frames = []
        for step in range(1, steps + 1):
            self.step(self.expert_action())
            if step % stride == 0:
                frames.append(self.render())
        self._expert = snapshot.restore()
        return np.stack(frames) if frames else np.zeros((0, *self._size, 3), np.uint8)

    def close(self) -> None:
        """Free the renderer now: left to the interpreter's exit, EGL prints tracebacks."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._env.close()

    def _plan(self) -> None:
        from mvjax.evaluation.suites.libero_expert import PickAndPlace

        if self._expert is None:
            goal = self._env.parsed_problem["goal_state"]
            self._expert = PickAndPlace(self._model, self._data, goal)

    def _hand(self):
        return self._data.body(self._robot.robot_model.eef_name)


# A policy's actions as LIBERO's simulator takes them.


_ACTION = parse(HDF5_ACTION, "action")


def libero_commands(chunk: np.ndarray, proprio: np.ndarray) -> np.ndarray:
    """OSC_POSE actions of a policy's ten numbers (`data_pipelines/embodiments/libero_panda.py`).

    Args:
        chunk: float32 [h, 10]: position delta 3, two rows of the rotation delta 6, gripper.
        proprio: unused, since actions are relative to wherever the hand is.

    Returns:
        float32 [h, 7]; the gripper opens (-1) or closes (1), nothing between.
    """
    del proprio
    actions = restore(_ACTION, chunk, {})["actions"]
    actions[:, 6] = np.where(actions[:, 6] > 0, 1, -1)
    return actions.astype(np.float32)


# The Python of LIBERO's own environment (`bash launch/libero.sh`).


PYTHON_VARIABLE = "MVJAX_LIBERO_PYTHON"
_ROOT = Path(__file__).parents[3]


def libero_python() -> Path:
    """Where it is.

    Raises:
        FileNotFoundError: there is none yet.
    """
    given = os.environ.get(PYTHON_VARIABLE)
    python = Path(given) if given else _ROOT / ".venv-libero" / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(
            f"LIBERO has an environment of its own, but there is no {python}: make it with `bash "
            f"launch/libero.sh`, or set {PYTHON_VARIABLE}."
        )
    return python


def in_libero_python(module: str) -> None:
    """Runs `python -m module` with the same arguments there, in place of this process.

    Returns where LIBERO is installed beside this interpreter already.

    Raises:
        FileNotFoundError: there is no such Python yet.
    """
    if importlib.util.find_spec("libero") is None:
        python = str(libero_python())
        path = {"PYTHONPATH": str(_ROOT)}
        os.execve(python, [python, "-m", module, *sys.argv[1:]], {**os.environ, **path})
