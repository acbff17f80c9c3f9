"""The simulators in which policies are evaluated and demonstrations recorded.

To add one:

1. Write `suites/<name>.py` with a class that follows `Simulator`. It runs in worker processes and
   must not import jax. It imports the simulator's packages inside functions, since the evaluating
   process imports the file, too, and need not have them installed.
2. Add a `Suite` to `SUITES` at the end of this file, under the name for `evaluation.suite` of a
   configuration and `launch.record --suite`.
"""

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mvjax.evaluation.suites import libero, libero_scene, metaworld
from mvjax.evaluation.suites.mujoco_camera import draw_off_screen, renderer


class Simulator(Protocol):
    """One task of one simulator.

    Attributes:
        instruction: the task in words.
        control_hz: control steps per second of simulated time.
        max_steps: control steps after which an episode counts as failed.
        action_dim: numbers in an action.
    """

    instruction: str
    control_hz: int
    max_steps: int
    action_dim: int

    def reset(self, seed: int) -> None:
        """Start an episode; equal seeds give equal episodes."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """Apply one action (float [d], environment units) and return whether the task is done."""
        ...

    def render(self, camera: str) -> np.ndarray:
        """A camera of the suite (`Suite.cameras`), upright: uint8 [h, w, 3]."""
        ...

    def proprio(self) -> np.ndarray:
        """The robot's own state: float32 [d], raw units."""
        ...

    def expert_action(self) -> np.ndarray:
        """The action of a scripted expert: float32 [d]."""
        ...

    def lookahead(self, steps: int, stride: int, cameras: Sequence[str]) -> dict[str, np.ndarray]:
        """The future under the expert; the episode itself is left as it was.

        Args:
            steps: control steps to look ahead.
            stride: control steps between frames.
            cameras: of the suite.

        Returns:
            camera -> uint8 [steps // stride, h, w, 3]: frames `stride`, `2 * stride`, ... steps
            from now.
        """
        ...

    def close(self) -> None:
        """Free the renderer; the simulator cannot be used afterwards."""
        ...


MakeSimulator = Callable[..., Simulator]
"""task -> its simulator; importable by name, since it is called in another process."""

Convert = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A policy's chunk [h, action_dim] and its present proprioception [proprio_dim] -> the simulator's
actions [h, any]; for example poses relative to the present one made absolute."""


@dataclass(frozen=True)
class Suite:
    """A simulator as evaluations and recordings use it.

    A recording of kind "robot" (LeRobot) needs a simulator with `lerobot_state()`, its
    "observation.state" as float32 [d]; "video" (files) the argument `camera_jitter_seed`; "hdf5"
    (LIBERO's layout) `hdf5_row()` and `hdf5_scene()`, the rows and the metadata of a file.

    Attributes:
        make_simulator: task -> simulator, called in the worker; recordings also pass `height` and
            `width`.
        check_task: raises ValueError for a task that the suite does not have.
        control_hz: control steps per second of simulated time.
        kinds: the kinds of recordings, see above.
        size: default height and width of recorded pictures in pixels.
        embodiment: the robot's name in a LeRobot dataset: a file of data_pipelines/embodiments,
            whose `CAMERAS` are the suite's.
        states: number of the initial states in which the suite is evaluated, by seed; larger seeds
            draw others. 0 if all seeds draw.
        packages: those whose versions may change an episode.
        contents: returns digests of files that decide an episode and have no version, by name; in
            the Python that has the simulator.
        convert: makes the policy's actions the simulator's.
        signed_gripper: the number of the policy's action that opens the gripper when it is negative
            and closes it when it is positive; None if it has no such command.
        interpreter: returns the Python that has the simulator, or raises if there is none.
    """

    make_simulator: MakeSimulator
    check_task: Callable[[str], Any]
    control_hz: int
    kinds: tuple[str, ...]
    size: tuple[int, int]
    embodiment: str
    states: int = 0
    packages: tuple[str, ...] = ("mujoco", "numpy")
    contents: Callable[[], dict[str, str]] = dict
    convert: Convert = lambda chunk, proprio: chunk
    signed_gripper: int | None = None
    interpreter: Callable[[], Path] = lambda: Path(sys.executable)

    @property
    def cameras(self) -> tuple[str, ...]:
        """The names that `Simulator.render` takes, the main camera first."""
        robot = importlib.import_module(f"data_pipelines.embodiments.{self.embodiment}")
        return tuple(robot.CAMERAS)


SUITES = {
    "metaworld": Suite(
        metaworld.MetaWorld,
        metaworld.check_task,
        control_hz=80,
        kinds=("robot", "video"),
        size=(192, 192),
        embodiment="metaworld_sawyer",
        packages=("metaworld", "mujoco", "gymnasium", "numpy"),
    ),
    "libero": Suite(
        libero.Libero,
        libero_scene.split_task,
        control_hz=20,
        kinds=("robot", "hdf5"),
        size=(480, 640),
        embodiment="libero_panda",
        states=50,
        packages=("hf-libero", "robosuite", "bddl", "mujoco", "gymnasium", "numpy"),
        contents=libero_scene.contents,
        convert=libero.libero_commands,
        signed_gripper=9,
        interpreter=libero.libero_python,
    ),
}


def versions(name: str) -> dict[str, str]:
    """What an episode of a suite depends on beside the policy, in the Python that calls this.

    Returns:
        "python", each of the suite's packages ("none" where it is not installed), its contents,
        "gl_backend" and "gl_renderer".
    """
    packages, contents = package_versions(name), SUITES[name].contents()
    return {"python": platform.python_version(), **packages, **contents, **renderer()}


def package_versions(name: str) -> dict[str, str]:
    """The versions of a suite's packages; "none" where one is not installed.

    One that was installed from a repository has its commit, too: many have the same version.
    """
    found = {}
    for package in SUITES[name].packages:
        try:
            installed = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
            continue
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id", "")[:12]
        found[package] = f"{installed.version} {commit}".strip()
    return found


def worker_versions(name: str) -> dict[str, str]:
    """`versions` in the Python that simulates, in a process of its own.

    Raises:
        FileNotFoundError: there is no such Python yet.
        RuntimeError: it could not tell; the message is its own.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    draw_off_screen(environment)
    program = f"import json; from {__name__} import versions; print(json.dumps(versions({name!r})))"
    done = subprocess.run(
        [str(SUITES[name].interpreter()), "-c", program],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"the simulator's Python did not report its versions: {done.stderr.strip()[-500:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])
