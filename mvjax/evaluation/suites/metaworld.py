"""Meta-World v3 (Yu et al. 2019; `pip install metaworld`): 50 tabletop tasks, scripted experts.

Conventions are the public ones: camera corner2 at [0.75, 0.075, 0.7] turned upright, actions
(dx, dy, dz, gripper) in [-1, 1], proprioception = hand position (m) and gripper opening (0..1), and
80 control steps per simulated second (5 substeps of 2.5 ms). The gripper's camera, gripperPOV,
looks down from the hand; away from the robot is up in its pictures.
"""

import copy
import sys
import warnings
from collections.abc import Sequence

import numpy as np

from mvjax.evaluation.suites.mujoco_camera import (
    NO_GL,
    MujocoCamera,
    draw_off_screen,
    frames_ahead,
)

# As in `CAMERAS` of the embodiment -> in the simulator's model.
CAMERAS = {"corner": "corner2", "gripper": "gripperPOV"}
CAMERA_POSITION = (0.75, 0.075, 0.7)
CAMERA_JITTER_M = 0.04
CAMERA_JITTER_FOVY = 3.0  # degrees

TASKS: dict[str, str] = {
    "assembly-v3": "pick up the ring and slide it onto the peg",
    "basketball-v3": "drop the basketball into the hoop",
    "bin-picking-v3": "move the cube from one bin to the other",
    "box-close-v3": "put the lid on the box",
    "button-press-topdown-v3": "press the button down from above",
    "button-press-topdown-wall-v3": "reach over the wall and press the button down",
    "button-press-v3": "push the button in",
    "button-press-wall-v3": "go around the wall and push the button in",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "lift the ring off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "turn the lock of the door to lock it",
    "door-open-v3": "open the door",
    "door-unlock-v3": "turn the lock of the door to unlock it",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-close-v3": "turn the faucet handle to close it",
    "faucet-open-v3": "turn the faucet handle to open it",
    "hammer-v3": "hammer the nail into the block",
    "hand-insert-v3": "push the block into the hole with the gripper",
    "handle-press-side-v3": "press the sideways handle down",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the sideways handle up",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "peg-insert-side-v3": "insert the peg into the hole in the side of the box",
    "peg-unplug-side-v3": "pull the peg out of the side of the box",
    "pick-out-of-hole-v3": "take the puck out of the hole",
    "pick-place-v3": "pick up the puck and bring it to the goal",
    "pick-place-wall-v3": "lift the puck over the wall and bring it to the goal",
    "plate-slide-back-side-v3": "slide the plate sideways out of the cabinet",
    "plate-slide-back-v3": "slide the plate back out of the cabinet",
    "plate-slide-side-v3": "slide the plate sideways into the cabinet",
    "plate-slide-v3": "slide the plate into the cabinet",
    "push-back-v3": "pull the puck back to the goal",
    "push-v3": "push the puck to the goal",
    "push-wall-v3": "push the puck around the wall to the goal",
    "reach-v3": "move the gripper to the goal",
    "reach-wall-v3": "move the gripper past the wall to the goal",
    "shelf-place-v3": "put the puck on the shelf",
    "soccer-v3": "kick the ball into the goal",
    "stick-pull-v3": "pull the thermos with the stick",
    "stick-push-v3": "push the thermos with the stick",
    "sweep-into-v3": "sweep the puck into the hole",
    "sweep-v3": "sweep the puck off the table",
    "window-close-v3": "slide the window shut",
    "window-open-v3": "slide the window open",
}


def check_task(task: str) -> None:
    """Raises ValueError for a task that Meta-World does not have."""
    if task not in TASKS:
        raise ValueError(f"unknown Meta-World task {task!r}; the tasks are {', '.join(TASKS)}")


class MetaWorld:
    """A Meta-World task (see `mvjax.evaluation.suites.suite.Simulator`).

    Args:
        task: a key of `TASKS`.
        height, width: of the pictures, pixels.
        camera_jitter_seed: if given, every reset moves the corner camera (up to 4 cm and 3 degrees
            of field of view), as this seed and the reset's seed determine.
    """

    control_hz = 80
    action_dim = 4
    max_steps = 500

    def __init__(
        self, task: str, height: int = 192, width: int = 192, camera_jitter_seed: int | None = None
    ):
        check_task(task)
        self._mujoco, env_classes, experts = _import_metaworld()
        self.task = task
        self.instruction = TASKS[task]
        self._jitter_seed = camera_jitter_seed
        self._env = _make_env(env_classes[task])
        self._expert = experts[task]()
        self._obs = None
        model = self._env.model
        self._pictures = MujocoCamera(model, height, width)
        self._camera = model.camera(CAMERAS["corner"]).id
        self._fovy = float(model.cam_fovy[self._camera])
        model.cam_pos[self._camera] = CAMERA_POSITION

    def reset(self, seed: int) -> None:
        """Place the objects by `seed` and put the arm in its start pose."""
        env, model = self._env, self._env.model
        env.seed(seed)
        env.reset()
        if self._jitter_seed is not None:
            draw = np.random.default_rng([self._jitter_seed, seed]).uniform(-1, 1, 4)
            model.cam_pos[self._camera] = CAMERA_POSITION + CAMERA_JITTER_M * draw[:3]
            model.cam_fovy[self._camera] = self._fovy + CAMERA_JITTER_FOVY * draw[3]
        # The reset moves bodies in the model after its last forward pass: without this call
        # pictures and observations would show the previous placement.
        self._mujoco.mj_forward(model, env.data)
        env._prev_obs = env._get_curr_obs_combined_no_goal()
        self._obs = env._get_obs()

    def step(self, action: np.ndarray) -> bool:
        """Apply (dx, dy, dz, gripper) in [-1, 1] for 12.5 ms; True when the task is done."""
        if self._obs is None:
            raise RuntimeError("call reset(seed) before step(action)")
        action = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        self._obs, _, _, _, info = self._env.step(action)
        return bool(info["success"])

    def render(self, camera: str) -> np.ndarray:
        """The camera "corner" or "gripper", upright: uint8 [height, width, 3]."""
        picture = self._pictures.draw(self._env.data, CAMERAS[camera])
        if camera == "corner":  # it is mounted upside down
            picture = picture[::-1, ::-1]
        return np.ascontiguousarray(picture)

    def proprio(self) -> np.ndarray:
        """Hand position (m) and gripper opening (0..1): float32 [4]."""
        return self._obs[:4].astype(np.float32)

    lerobot_state = proprio  # "observation.state" of a recording

    def expert_action(self) -> np.ndarray:
        """The scripted policy's action, clipped to [-1, 1]: float32 [4]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of every response beyond 1, which we clip
            # A copy, since some experts modify the observation in place.
            action = self._expert.get_action(self._obs.copy())
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def lookahead(self, steps: int, stride: int, cameras: Sequence[str]) -> dict[str, np.ndarray]:
        """The future under the expert; stepping on afterwards is bit-identical."""
        env = self._env
        data, obs, attributes = env.data, self._obs, _small_attributes(env)
        # The look-ahead runs in a copy, contacts and warm starts included.
        env.data = copy.copy(data)
        frames = frames_ahead(self, steps, stride, cameras)
        env.data, self._obs = data, obs
        for name, (value, content) in attributes.items():
            setattr(env, name, value)
            if content is not None:
                value[...] = content
        return frames

    def close(self) -> None:
        """Free the renderer; the simulator cannot be used afterwards."""
        self._pictures.close()
        self._env.close()


def _import_metaworld():
    """mujoco, and the environment classes and experts by task."""
    draw_off_screen()
    try:
        import mujoco
        from metaworld.env_dict import ENV_CLS_MAP
        from metaworld.policies import ENV_POLICY_MAP
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Meta-World needs the package {error.name!r}: pip install metaworld packaging"
        ) from error
    except Exception as error:  # PyOpenGL raises various types if a GL library is missing
        raise RuntimeError(NO_GL.format(reason=error)) from error
    return mujoco, ENV_CLS_MAP, ENV_POLICY_MAP


def _make_env(env_class):
    """The environment with a visible goal, random placements and no step limit."""
    env = env_class()
    env._partially_observable = False  # the experts read the goal from the observation
    vars(env).pop("sawyer_observation_space", None)  # cached for the hidden goal
    env._set_task_called = True
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True  # draw placements from env.seed(...), not from numpy's global state
    env.max_path_length = sys.maxsize  # it would raise after 500 steps; our callers count steps
    return env


def _small_attributes(env) -> dict:
    """An environment's Python state: name -> (object, a copy of its content if it is an array).

    Arrays are restored in place: some are views into mjData and must remain views.
    """
    kept = (bool, int, float, str, tuple, type(None), np.generic)
    return {
        name: (value, value.copy() if isinstance(value, np.ndarray) else None)
        for name, value in vars(env).items()
        if isinstance(value, (*kept, np.ndarray))
    }
