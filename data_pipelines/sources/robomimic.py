"""Demonstrations in HDF5: robomimic's layout, and files of one episode as ALOHA and RoboTwin write.

    data/                                attributes env_args, problem_info, ... (JSON)
    data/demo_<i>/actions, states, ...   an array per signal, one row per step
    data/demo_<i>/obs/<key>              observations, cameras among them
    mask/<key>                           names of demonstrations, e.g. a "train" split

LIBERO, robosuite, MimicGen, RoboCasa and IsaacLab write this layout. A file with an array of
`EPISODE_ACTIONS` instead of `data` is one episode. A stream is named by the array's path below the
demonstration: "actions", "obs/agentview_rgb", "observations/images/cam_high".

Cameras are uint8 arrays, [T, h, w, 3] and the like (`pictures.py`), or JPEG, PNG or WebP files.
What neither is nor holds one number or vector per action is in `Episode.left_out`.

LIBERO's own files store images as OpenGL draws them, bottom row first; `flip="vertical"` puts them
upright. mimic-video and OpenVLA rotate them by 180 degrees instead, which swaps left and right;
models trained on such images need `flip="rotate"`. Their regenerated files are rotated already, and
robomimic's own datasets are upright; neither needs a flip.

In LIBERO's own files the observation of a row follows its action; an action `shift` of one step,
0.05 s, pairs it with the next action. In robomimic's files it precedes the action.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_pipelines.episode import Episode, LazyEpisodes, Section, Stream
from data_pipelines.frames import Frames
from data_pipelines.sources import hdf5
from data_pipelines.sources.files import UNKNOWN_RATE, Visit, glance, sections, step_times, walk
from data_pipelines.sources.hdf5 import FLIPS, Hdf5Pool, json_attribute, string

SUFFIXES = (".hdf5", ".h5")
STYLES = ("stored", "release")
# The arrays that say that a whole file is one episode: ALOHA's, RoboTwin's.
EPISODE_ACTIONS = ("action", "joint_action/vector")
# robosuite's own rate, which holds where a file is robosuite's and does not say another one.
ROBOSUITE_HZ = 20.0
_ROBOSUITE = 1  # the number of this kind of environment in robomimic
_LIBEROS = ("problem_info", "bddl_file_name", "macros_image_convention")  # attributes of its files
_RATES = ("fps", "hz", "frequency", "control_freq", "control_frequency")  # other attributes
_SCENE = re.compile(r"^[A-Z_]+_SCENE\d+_")
_NUMBER = re.compile(r"\d+")
_TEXTS = ("language_instruction", "language_raw", "instruction")  # in a demonstration
_NEXT = "next_obs/"
_FAILED = (
    "a demonstration's attribute `success` is false; it is used (the option mask chooses others)"
)
# LIBERO's macros_image_convention -> the options that do not fit it, and those that do.
_FLIPS = {"opengl": (("none",), "vertical or rotate"), "opencv": (("vertical", "rotate"), "none")}
_UPSIDE_DOWN = (
    "macros_image_convention is {} and the option flip {}, so that pictures are upside down; set "
    "flip to {}"
)
_TWICE = (
    "two names of demonstrations lead to the same group of one file; both are episodes, so the "
    "validation split may hold what is trained on"
)


def recognises(path: Path) -> bool:
    """Whether this is an HDF5 file of demonstrations, or a folder with some."""
    files = [path] if path.is_file() else islice(_files(glance(path)), 3)
    for file in files:
        with suppress(ValueError):
            if file.suffix in SUFFIXES and _demonstrations(Hdf5Pool(), file, "", None):
                return True
    return False


def explain(path: Path) -> str:
    """Why this is no HDF5 file of demonstrations, or folder of some; "" if it has no such files."""
    files = iter([path]) if path.suffix in SUFFIXES and path.is_file() else _files(glance(path))
    try:
        for file in islice(files, 1):
            _demonstrations(Hdf5Pool(), file, "", None)
    except ValueError as error:
        return str(error)
    return ""


def open_robomimic_hdf5(
    path: Path,
    *,
    name: str,
    embodiment: str,
    fps: float | None = None,
    flip: str = "none",
    channels: str = "rgb",
    mask: str | None = None,
    instruction: str | None = None,
    instruction_style: str = "stored",
) -> Sequence[Episode]:
    """Opens one file or a folder of files; arrays are read when an episode is accessed.

    Args:
        path: an .hdf5 file, or a folder that holds such files at any depth.
        name, embodiment: see `formats`.
        fps: steps per second; None takes what the file's `env_args` say: `control_freq`, or the
            `dt` and `decimation` of IsaacLab's `sim_args`. robosuite's and LIBERO's files that say
            nothing have robosuite's 20.
        flip: of every image: "none", "vertical" (rows reversed) or "rotate" (180 degrees).
        channels: "bgr" if blue is stored first, which no file says. OpenCV's `imencode` takes
            pictures for BGR, so JPEGs that were made of RGB with it need it too.
        mask: read only the demonstrations that `mask/<this>` lists.
        instruction: one for the whole dataset, in place of the files'.
        instruction_style: "stored" takes the file's text, or the words of a name such as
            `KITCHEN_SCENE1_open_the_drawer_demo.hdf5` without the scene; "release" is the wording
            mimic-video was trained with: the name's words, "bowl" for "black bowl", a full stop.

    Raises:
        ValueError: if an option is unknown, or no file has demonstrations.
    """
    given = (flip, FLIPS), (instruction_style, STYLES), (channels, ("rgb", "bgr"))
    if any(value not in known for value, known in given):
        raise ValueError(
            f"dataset {name!r}: flip is {flip!r}, instruction_style {instruction_style!r} and "
            f"channels {channels!r}; choose from {', '.join(FLIPS)}, from {', '.join(STYLES)} and "
            "from rgb, bgr"
        )
    path = Path(path)
    root, files = (path.parent, [path]) if path.is_file() else (path, sorted(_files(walk(path))))
    pool = Hdf5Pool()
    demos: list[_Demo] = []
    for file in files:
        id = file.relative_to(root).with_suffix("").as_posix()
        try:
            demos += _demonstrations(pool, file, id, mask)
        except ValueError as error:  # one entry for the file, so that it is counted
            demos.append(_Demo(id, file, fault=str(error)))
    if all(demo.fault for demo in demos):
        reason = demos[0].fault if demos else f"{path} has no {' or '.join(SUFFIXES)} file"
        raise ValueError(f"no demonstrations in {path}: {reason}")
    if len({demo.id for demo in demos}) < len(demos):
        raise ValueError(f"{path} has files that differ only in the suffix; move one of them away")
    places = Counter(demo.place for demo in demos if demo.place)
    demos = [replace(demo, twice=places[demo.place] > 1) for demo in demos]
    dataset = _Dataset(
        name, embodiment, fps, flip, channels == "bgr", instruction, instruction_style, demos, pool
    )
    return LazyEpisodes(len(demos), dataset.load)


def _files(visits: Iterator[Visit]) -> Iterator[Path]:
    return (folder / n for folder, _, names in visits for n in names if n.endswith(SUFFIXES))


@dataclass(frozen=True)
class _Demo:
    id: str
    file: Path  # that lists it, and the path in it; either may be a link
    key: str = ""
    actions: str = "actions"
    fault: str = ""
    place: tuple[str, int] | None = None  # see `hdf5.place`
    twice: bool = False  # whether another one has the same place

    @property
    def where(self) -> str:
        """The file and the demonstration, for messages."""
        name = self.key.rpartition("/")[2]
        return f"{self.file}: {name}" if name else f"{self.file}"


def _demonstrations(pool: Hdf5Pool, path: Path, id: str, mask: str | None) -> list[_Demo]:
    """The demonstrations of a file in the order of their numbers; links are followed."""
    with pool.open(path) as file:
        try:
            data = hdf5.follow(file, "data") if "data" in file.keys() else None
        except ValueError as error:
            raise ValueError(f"{path}: data: {error}") from error
        if not isinstance(data, h5py.Group):
            for actions in EPISODE_ACTIONS:
                if isinstance(file.get(actions), h5py.Dataset) and mask is None:
                    return [_Demo(id, path, "/", actions, place=hdf5.place(file))]
            found = (
                f"no group `data`, but {hdf5.listed(file)}" if data is None else "an array `data`"
            )
            raise ValueError(
                f"{path} has no demonstrations: it has {found}{hdf5.other_layout(file)}"
            )
        names = [name for name in data if _is_demonstration(data, name)]
        if mask is not None:
            if f"mask/{mask}" not in file:
                known = sorted(file["mask"]) if "mask" in file else "none"
                raise ValueError(f"{path} has no mask {mask!r}; its masks are {known}")
            chosen = {string(n) for n in file[f"mask/{mask}"][()]}
            if missing := sorted(chosen.difference(names)):
                raise ValueError(f"{path}: the mask {mask!r} lists {missing[0]}, which is missing")
            names = [n for n in names if n in chosen]
        if not names:
            raise ValueError(
                f"{path} has no demonstrations (data/demo_<number>), but {hdf5.listed(data)} there"
            )
        names.sort(key=lambda n: ([int(number) for number in _NUMBER.findall(n)], n))
        return [_followed(path, data, name, f"{id}/{name}") for name in names]


def _is_demonstration(data: h5py.Group, name: str) -> bool:
    """Whether it is one by its name, or by its content as a group with other names."""
    if name.startswith("demo_") and name[5:].isdecimal():
        return True
    with suppress(ValueError):
        node = hdf5.follow(data, name)
        return isinstance(node, h5py.Group) and "actions" in node
    return False


def _followed(path: Path, data: h5py.Group, name: str, id: str) -> _Demo:
    try:
        node = hdf5.follow(data, name)
    except ValueError as error:
        return _Demo(id, path, fault=f"{path}: {name}: {error}")
    if not isinstance(node, h5py.Group):
        return _Demo(id, path, fault=f"{path}: {name} is not a group")
    return _Demo(id, path, f"/data/{name}", place=hdf5.place(node))


@dataclass(frozen=True)
class _Dataset:
    name: str
    embodiment: str
    fps: float | None
    flip: str
    bgr: bool
    instruction: str | None
    style: str
    demos: list[_Demo]
    pool: Hdf5Pool = field(repr=False)

    def load(self, index: int) -> Episode:
        demo = self.demos[index]
        if demo.fault:
            raise ValueError(demo.fault)
        with self._opened(demo) as (group, described):
            arrays, left_out = hdf5.arrays(group)
            findings = [_TWICE] if demo.twice else []
            if "success" in group.attrs and not np.all(group.attrs["success"]):
                findings.append(_FAILED)
            if why := left_out.get(demo.actions):
                raise ValueError(f"{demo.where}: {demo.actions}: {why}")
            length = _length(demo, group, arrays, findings)
            rate = self._rate(demo, group, described)
            times = step_times(length, rate or 1)
            findings += hdf5.step_findings(arrays, length, rate)
            drawn = [string(node.attrs.get("macros_image_convention", "")) for node in described]
            for convention, (wrong, right) in _FLIPS.items():
                if convention in drawn and self.flip in wrong:
                    findings.append(_UPSIDE_DOWN.format(convention, self.flip, right))
            texts, parts = self._texts(demo, group, described, arrays, times, findings)
            streams = {}
            for key, array in arrays.items():
                if _is_text(key, array):
                    continue
                try:
                    if key.startswith(_NEXT):
                        raise ValueError("the observation after each action; obs has it, too")
                    where = demo.file, f"{demo.key}/{key}", self.pool
                    values = hdf5.values(array, where, length, self.flip, self.bgr)
                except ValueError as error:
                    left_out[key] = str(error)
                else:
                    streams[key] = Stream(times, values)
            return Episode(
                id=demo.id,
                source=self.name,
                embodiment=self.embodiment,
                instructions=texts,
                streams=streams,
                cameras=tuple(key for key, s in streams.items() if isinstance(s.values, Frames)),
                sections=parts,
                left_out=left_out,
                findings=tuple(findings),
                unknown_rate="" if rate else UNKNOWN_RATE.format(demo.file),
            )

    @contextmanager
    def _opened(self, demo: _Demo) -> Iterator[tuple[h5py.Group, list[h5py.Group]]]:
        """A demonstration's group, and the groups that describe it, the nearest first."""
        with self.pool.open(demo.file) as file:
            group = file[demo.key]
            described = [group if demo.key == "/" else file["data"]]
            if demo.place and demo.place[0] != os.path.realpath(demo.file):
                with suppress(KeyError, RuntimeError):  # the group around it in its own file
                    described.insert(0, group.parent)
            yield group, described

    def _rate(self, demo: _Demo, group: h5py.Group, described: list[h5py.Group]) -> float | None:
        if self.fps is not None:
            return self.fps
        stated: dict[str, float] = {}
        for node in described:
            stated |= {f"{name} of {node.file.filename}": r for name, r in _stated_rates(node)}
        if len({round(rate, 6) for rate in stated.values()}) > 1:
            raise ValueError(f"{demo.where}: the rates disagree, {stated}; set the option fps")
        others = ((node, name) for node in described for name in _RATES if name in node.attrs)
        for node, name in () if stated else others:
            stated[name] = _positive(node, name, np.asarray(node.attrs[name]).tolist())
        if stated:
            return next(iter(stated.values()))
        if any(_is_robosuites(node) for node in described):
            return ROBOSUITE_HZ
        return None

    def _texts(
        self,
        demo: _Demo,
        group: h5py.Group,
        described: list[h5py.Group],
        arrays: dict[str, h5py.Dataset],
        times: np.ndarray,
        findings: list[str],
    ) -> tuple[tuple[str, ...], tuple[Section, ...]]:
        """The instructions of a demonstration, ("",) if there are none, and its sections."""
        stem = Path(group.file.filename).stem  # of the file where it really is
        words, parts = stem.removesuffix("_demo"), ()
        if self.instruction is not None:
            texts = (self.instruction,)
        elif self.style == "release":
            texts = (words.replace("_", " ").replace("black bowl", "bowl") + ".",)
        else:
            named = words != stem
            texts = (_SCENE.sub("", words).replace("_", " ") if named else "",)
            stated = _stated_texts(group, described)
            if steps := _texts_of_steps(arrays, len(times)):
                texts, parts = sections(times, steps)
            elif stated:
                source, texts = next(iter(stated.items()))
                if other := [name for name, found in stated.items() if found != texts]:
                    findings.append(
                        f"the instructions in {source} and in {other[0]} differ; {source} is taken"
                    )
        for text in texts:
            if not text.isprintable():  # h5py turns bytes that are not UTF-8 into surrogates
                raise ValueError(
                    f"{demo.file}: the instruction {text!r} is not printable UTF-8 text"
                )
        return texts, parts


def _stated_rates(group: h5py.Group) -> Iterator[tuple[str, float]]:
    """The rates that a group's attributes state."""
    about = json_attribute(group, "env_args")
    kwargs, physics = about.get("env_kwargs"), about.get("sim_args")
    info = json_attribute(group, "env_info")  # of robosuite's own recordings
    for name, stated in (("env_kwargs", kwargs), ("env_args", about), ("env_info", info)):
        if isinstance(stated, dict) and stated.get("control_freq") is not None:
            rate = _positive(group, "control_freq", stated["control_freq"])
            yield f"control_freq in {name}", rate
    if isinstance(physics, dict) and {"dt", "decimation"} <= physics.keys():
        seconds = [_positive(group, name, physics[name]) for name in ("dt", "decimation")]
        # In floating point 1 / (0.01 * 5) is not exactly 20.
        yield "sim_args", round(1 / (seconds[0] * seconds[1]), 6)


def _positive(group: h5py.Group, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(
            f"{group.file.filename}: {name} is {value!r}; set the option fps to the steps per "
            "second"
        )
    return float(value)


def _is_robosuites(group: h5py.Group) -> bool:
    """Whether attributes say that robosuite wrote this: LIBERO's, robomimic's, its own."""
    about = json_attribute(group, "env_args")
    if "control_freq" in string(group.attrs.get("env_args", "")):
        return False  # what it says of the rate could not be read
    kind = about.get("type")
    own = {"env", "repository_version"} <= group.attrs.keys()
    return own or kind == _ROBOSUITE or any(name in group.attrs for name in _LIBEROS)


def _stated_texts(group: h5py.Group, described: list[h5py.Group]) -> dict[str, tuple[str, ...]]:
    """Instructions by where they are stated, the nearest to the demonstration first."""
    found = {"ep_meta": json_attribute(group, "ep_meta").get("lang")}  # RoboCasa's
    for name in _TEXTS:
        found[name] = string(group.attrs[name]) if name in group.attrs else None
        array = group.get(name) if name in group else None
        if isinstance(array, h5py.Dataset) and h5py.check_string_dtype(array.dtype):
            found[name] = [string(text) for text in np.ravel(array[()])] if array.size == 1 else ()
    for place, node in zip(("problem_info", "problem_info of the listing file"), described):
        found[place] = json_attribute(node, "problem_info").get("language_instruction")  # LIBERO's
        found |= {f"env_args of {place}": json_attribute(node, "env_args").get("prompt")}
    return {name: texts for name, value in found.items() if (texts := _sentences(value))}


def _sentences(value: Any) -> tuple[str, ...]:
    """The texts of a JSON value: one, or a list; LIBERO has some as lists of characters."""
    texts = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) for text in texts):
        return ()
    if all(len(text) == 1 for text in texts):
        texts = ["".join(texts)]
    texts = [text.strip().strip('"').strip() for text in texts]  # LIBERO has some in quotes
    return tuple(dict.fromkeys(filter(None, texts)))


def _is_text(key: str, array: h5py.Dataset) -> bool:
    return key.rpartition("/")[2] in _TEXTS and bool(h5py.check_string_dtype(array.dtype))


def _texts_of_steps(arrays: Mapping[str, h5py.Dataset], steps: int) -> list[tuple[str, ...]]:
    """The texts of every step, if the demonstration has an array of them."""
    columns = []
    for key, array in arrays.items():
        if _is_text(key, array) and array.shape == (steps,) and steps > 1:
            columns.append([string(value).strip() for value in array[()]])
    rows = zip(*columns)
    return [tuple(dict.fromkeys(filter(None, row))) for row in rows]


def _length(
    demo: _Demo, group: h5py.Group, arrays: dict[str, h5py.Dataset], findings: list[str]
) -> int:
    """The number of actions, which must be what the file declares."""
    actions = arrays.get(demo.actions)
    if actions is None or not actions.shape:
        raise ValueError(f"{demo.where} has no array `{demo.actions}`, but {hdf5.listed(group)}")
    length = len(actions)
    if length == 0:
        raise ValueError(f"{demo.where} is empty; leave it out")
    if "num_samples" in group.attrs:  # LIBERO has strings and numbers
        try:
            (declared,) = np.ravel(group.attrs["num_samples"])
            declared = float(string(declared))
        except ValueError:
            findings.append("num_samples is not a number; the number of actions is taken")
        else:
            if declared != length:
                raise ValueError(
                    f"{demo.where} should have {declared:g} samples but has {length} actions; copy "
                    "or write the file again"
                )
    return length
