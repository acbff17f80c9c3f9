"""LIBERO's tasks, initial states and environments, without torch and without questions asked.

A task is called "<suite>-<number>", such as "spatial-3", by LIBERO's own order, which starts at 0.
Its name needs nothing installed; its `Scene` needs LIBERO (`bash launch/libero.sh`): hf-libero,
robosuite 1.4 and numpy 1, which cannot share an environment with a recent JAX. Meshes and textures
are not in LIBERO's wheel: they are read from the folder that MVJAX_LIBERO_ASSETS names, and
otherwise from where hf-libero puts them, which downloads them once.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from data_pipelines.pickles import read_array_pickle
from mvjax.evaluation.suites.mujoco_camera import draw_off_screen

ASSETS_VARIABLE = "MVJAX_LIBERO_ASSETS"
MAX_STEPS = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
"""Control steps after which an episode has failed: the first three as mimic-video, the rest as
openpi evaluates them."""
COUNTS = {"spatial": 10, "object": 10, "goal": 10, "10": 10, "90": 90}


def suite_tasks(suite: str) -> tuple[str, ...]:
    """All tasks of a suite, such as "goal-0" to "goal-9".

    Raises:
        ValueError: there is no such suite.
    """
    if suite not in COUNTS:
        raise ValueError(f"unknown LIBERO suite {suite!r}; the suites are {', '.join(COUNTS)}")
    return tuple(f"{suite}-{number}" for number in range(COUNTS[suite]))


def max_steps(task: str) -> int:
    """The step limit of a task's suite."""
    suite, _ = split_task(task)
    return MAX_STEPS[suite.removeprefix("libero_")]


def split_task(task: str) -> tuple[str, int]:
    """("libero_spatial", 3) of "spatial-3".

    Raises:
        ValueError: there is no such task.
    """
    suite, _, number = task.partition("-")
    if suite not in COUNTS or not number.isdecimal() or int(number) >= COUNTS[suite]:
        names = ", ".join(f"{suite}-0 to {suite}-{n - 1}" for suite, n in COUNTS.items())
        raise ValueError(f"unknown LIBERO task {task!r}; the tasks are {names}")
    return f"libero_{suite}", int(number)


class Scene:
    """One task's environment, not yet drawn.

    Attributes:
        name: LIBERO's name of the task, words joined by underscores.
        words: the same as a sentence.
        instruction: as mimic-video says it, with "bowl" for "black bowl".
        problem: the class of its environment.
        bddl: the task's definition, relative to LIBERO's folder of them.
        env: robosuite's environment.
        initial_states: float64 [50, s], one flattened simulator state per episode.
    """

    def __init__(self, task: str) -> None:
        """Builds the environment of a task such as "spatial-3"; takes about five seconds.

        Raises:
            ModuleNotFoundError: LIBERO is not installed in this interpreter.
            FileNotFoundError: its meshes and textures are not at hand.
            ValueError: there is no such task.
        """
        suite, number = split_task(task)
        libero = _import_libero()
        root = Path(libero.__file__).parent
        self.name = _task_names(root)[suite][number]
        self.words = _words(self.name)
        self.instruction = self.words.replace("black bowl", "bowl")
        self.bddl = f"{suite}/{self.name}.bddl"
        states = root / "init_files" / suite / f"{self.name}.pruned_init"
        self.initial_states = _read_initial_states(states)
        self.env = _make_environment(root / "bddl_files" / self.bddl)
        self.problem = type(self.env).__name__


def find_task(name: str) -> str:
    """The task of LIBERO's name, such as "goal-7" of "turn_on_the_stove".

    Raises:
        ValueError: there is no such task.
    """
    for suite, names in _task_names(Path(_import_libero().__file__).parent).items():
        if name in names:
            return f"{suite.removeprefix('libero_')}-{names.index(name)}"
    raise ValueError(
        f"LIBERO has no task {name!r}; files of demonstrations are called <task>_demo.hdf5"
    )


def _words(name: str) -> str:
    """A task's name as a sentence; LIBERO-100's names begin with their scene."""
    if name[0].isupper():
        name = name[name.find("_", name.find("SCENE")) + 1 :]
    return name.replace("_", " ")


@functools.cache
def _import_libero() -> ModuleType:
    # Importing LIBERO without its configuration file asks for one on the keyboard. What it says is
    # not used here, so every process has its own.
    folder = tempfile.TemporaryDirectory(prefix="libero-")
    Path(folder.name, "config.yaml").write_text("benchmark_root: unused\n")
    os.environ["LIBERO_CONFIG_PATH"] = folder.name
    draw_off_screen()
    logging.disable(logging.WARNING)  # robosuite asks for a file of settings that nobody needs
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module("libero.libero.envs")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"LIBERO needs the package {error.name!r}: make its environment with `bash "
            "launch/libero.sh`"
        ) from error
    finally:
        folder.cleanup()
        logging.disable(logging.NOTSET)
    libero = sys.modules["libero.libero"]
    assets = os.environ.get(ASSETS_VARIABLE) or libero.get_assets_path()
    if not Path(assets, "scenes").is_dir():
        raise FileNotFoundError(
            f"LIBERO's meshes and textures are not in {assets}: set {ASSETS_VARIABLE} to the "
            "folder `assets` of LIBERO's repository"
        )
    libero._assets_path_cache = assets  # which is where get_assets_path() looks first
    return libero


def _task_names(root: Path) -> dict[str, list[str]]:
    """LIBERO's names of all tasks by suite; its own package for this would import torch."""
    path = root / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.libero_task_map


def _read_initial_states(path: Path) -> np.ndarray:
    """What torch.load would give: a zip with one pickled array."""
    with zipfile.ZipFile(path) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return np.asarray(read_array_pickle(archive.read(member), path), np.float64)


def _make_environment(bddl: Path) -> Any:
    from libero.libero.envs.env_wrapper import ControlEnv

    # Soft resets give the same states as hard ones, which compile the model anew in seconds.
    env = ControlEnv(
        str(bddl),
        use_camera_obs=False,
        has_offscreen_renderer=False,
        hard_reset=False,
        ignore_done=True,
    ).env
    # robosuite works out some thirty observations at each of 25 substeps; ours are read from the
    # simulation when they are needed.
    env._update_observables = lambda force=False: None
    env._get_observations = lambda force_update=False: {}
    return env
