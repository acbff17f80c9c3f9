"""LIBERO's tasks, initial states and environments, without torch and without keyboard prompts.

A task is named "<suite>-<number>", such as "spatial-3", in LIBERO's own order from 0. Names need
nothing installed; a `Scene` needs LIBERO (`bash launch/libero.sh`): hf-libero, robosuite 1.4 and
numpy 1, which cannot share an environment with a recent JAX. Meshes and textures are not in
LIBERO's wheel: they are read from the folder MVJAX_LIBERO_ASSETS, or else from hf-libero's own,
into which it downloads them once.
"""

import contextlib
import functools
import hashlib
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
"""Step limits of an episode: the first three are mimic-video's, the others openpi's."""
COUNTS = {"spatial": 10, "object": 10, "goal": 10, "10": 10, "90": 90}


def suite_tasks(suite: str) -> tuple[str, ...]:
    """Returns all tasks of a suite, such as "goal-0" to "goal-9"; ValueError if it is unknown."""
    if suite not in COUNTS:
        raise ValueError(f"unknown LIBERO suite {suite!r}; the suites are {', '.join(COUNTS)}")
    return tuple(f"{suite}-{number}" for number in range(COUNTS[suite]))


def max_steps(task: str) -> int:
    """Returns the step limit of a task."""
    suite, _ = split_task(task)
    return MAX_STEPS[suite.removeprefix("libero_")]


def split_task(task: str) -> tuple[str, int]:
    """Returns ("libero_spatial", 3) for "spatial-3"; ValueError if the task is unknown."""
    suite, _, number = task.partition("-")
    if suite not in COUNTS or not number.isdecimal() or int(number) >= COUNTS[suite]:
        names = ", ".join(f"{suite}-0 to {suite}-{n - 1}" for suite, n in COUNTS.items())
        raise ValueError(f"unknown LIBERO task {task!r}; the tasks are {names}")
    return f"libero_{suite}", int(number)


class Scene:
    """One task's environment.

    Attributes:
        name: LIBERO's name of the task, words joined by underscores.
        sentence: the same with spaces, without the scene of LIBERO-100.
        instruction: mimic-video's wording, with "bowl" for "black bowl".
        problem: the class name of its environment.
        bddl: the file of the task's definition, relative to LIBERO's folder of them.
        env: robosuite's environment.
        initial_states: float64 [50, s], one flattened simulator state per episode.
    """

    def __init__(self, task: str) -> None:
        """Builds the environment of a task such as "spatial-3"; takes about five seconds.

        Raises:
            ModuleNotFoundError: if LIBERO is not installed in this Python.
            FileNotFoundError: if its meshes and textures are missing.
            ValueError: if the task is unknown.
        """
        suite, number = split_task(task)
        libero = _import_libero()
        root = Path(libero.__file__).parent
        self.name = _task_names(root)[suite][number]
        self.sentence = _sentence(self.name)
        self.instruction = self.sentence.replace("black bowl", "bowl")
        self.bddl = f"{suite}/{self.name}.bddl"
        states = root / "init_files" / suite / f"{self.name}.pruned_init"
        self.initial_states = _read_initial_states(states)
        self.env = _make_environment(root / "bddl_files" / self.bddl)
        self.problem = type(self.env).__name__


def contents() -> dict[str, str]:
    """The digest of LIBERO's tasks and initial states.

    Suites of perturbed tasks (LIBERO-PRO, LIBERO-plus) are put in their place, under the same names
    and the same version.
    """
    found = importlib.util.find_spec("libero")
    if found is None:
        return {}
    root, tasks = Path(found.submodule_search_locations[0], "libero"), hashlib.sha256()
    for pattern in ("benchmark/*.py", "bddl_files/*/*.bddl", "init_files/*/*.pruned_init"):
        for path in sorted(root.glob(pattern)):
            tasks.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return {"tasks": tasks.hexdigest()[:16]}


def find_task(name: str) -> str:
    """Returns the task of LIBERO's name: "goal-7" for "turn_on_the_stove"; ValueError if none."""
    for suite, names in _task_names(Path(_import_libero().__file__).parent).items():
        if name in names:
            return f"{suite.removeprefix('libero_')}-{names.index(name)}"
    raise ValueError(
        f"LIBERO has no task {name!r}; files of demonstrations are called <task>_demo.hdf5"
    )


def _sentence(name: str) -> str:
    """A task's name as a sentence; LIBERO-100's names begin with their scene."""
    if name[0].isupper():
        name = name[name.find("_", name.find("SCENE")) + 1 :]
    return name.replace("_", " ")


@functools.cache
def _import_libero() -> ModuleType:
    # Without a configuration file, importing LIBERO prompts for one on the keyboard. Its content is
    # not used here, so every process has a temporary one.
    folder = tempfile.TemporaryDirectory(prefix="libero-")
    Path(folder.name, "config.yaml").write_text("benchmark_root: unused\n")
    os.environ["LIBERO_CONFIG_PATH"] = folder.name
    draw_off_screen()
    logging.disable(logging.WARNING)  # robosuite warns that an optional settings file is missing
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module("libero.libero.envs")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"LIBERO needs the package {error.name!r}: create its environment with `bash "
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
    libero._assets_path_cache = assets  # what get_assets_path() returns from now on
    return libero


def _task_names(root: Path) -> dict[str, list[str]]:
    """LIBERO's names of all tasks by suite; importing its package for this would import torch."""
    path = root / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.libero_task_map


def _read_initial_states(path: Path) -> np.ndarray:
    """The array that torch.load would return: a zip with one pickle."""
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
    # robosuite computes some thirty observations at each of 25 substeps; ours are read from the
    # simulation when they are needed.
    env._update_observables = lambda force=False: None
    env._get_observations = lambda force_update=False: {}
    return env
