"""Demonstrations in HDF5 as robomimic lays them out: LIBERO, robosuite, MimicGen, RoboCasa.

    data/                                attributes env_args, problem_info, ... (JSON)
    data/demo_<i>/actions, states, ...   an array per signal, one row per step
    data/demo_<i>/obs/<key>              observations; uint8 [T, h, w, 3] are cameras
    mask/<key>                           names of demonstrations, e.g. a "train" split

A stream is named by the array's path below the demonstration: "actions", "obs/agentview_rgb".

LIBERO's own files store images as OpenGL draws them, bottom row first; `flip="vertical"` puts them
upright. mimic-video and OpenVLA rotate them by 180 degrees instead, which swaps left and right;
models trained on such images need `flip="rotate"`. Their regenerated files are rotated already, and
robomimic's own datasets are upright; neither needs a flip.

In LIBERO's own files the observation of a row follows its action; an action `shift` of one step,
0.05 s, pairs it with the next action. In robomimic's files it precedes the action.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream
from data_pipelines.sources.files import FLIPS, Hdf5Frames, Hdf5Pool, Visit, glance, walk

SUFFIXES = (".hdf5", ".h5")
STYLES = ("stored", "release")
LIBERO_HZ = 20.0
_SCENE = re.compile(r"^[A-Z_]+_SCENE\d+_")


def recognises(path: Path) -> bool:
    """Whether this is an HDF5 file of demonstrations, or a folder with some."""
    files = [path] if path.is_file() else islice(_files(glance(path)), 3)
    for file in files:
        with suppress(ValueError):
            if file.suffix in SUFFIXES and _demonstrations(Hdf5Pool(), file, None):
                return True
    return False


def open_robomimic_hdf5(
    path: Path,
    *,
    name: str,
    embodiment: str,
    fps: float | None = None,
    flip: str = "none",
    mask: str | None = None,
    instruction: str | None = None,
    instruction_style: str = "stored",
) -> Sequence[Episode]:
    """Opens one file or a folder of files; arrays are read when an episode is accessed.

    Args:
        path: an .hdf5 file, or a folder that holds such files at any depth.
        name, embodiment: see `formats`.
        fps: steps per second; None takes `control_freq` of the file's `env_args`, or else 20
            (LIBERO).
        flip: of every image: "none", "vertical" (rows reversed) or "rotate" (180 degrees).
        mask: read only the demonstrations that `mask/<this>` lists.
        instruction: one for the whole dataset, in place of the files'.
        instruction_style: "stored" takes the file's text, or the words of a name such as
            `KITCHEN_SCENE1_open_the_drawer_demo.hdf5` without the scene; "release" is the wording
            mimic-video was trained with: the name's words, "bowl" for "black bowl", a full stop.

    Raises:
        ValueError: if an option is unknown, or no file has demonstrations.
    """
    if flip not in FLIPS or instruction_style not in STYLES:
        raise ValueError(
            f"dataset {name!r}: flip is {flip!r} and instruction_style {instruction_style!r}; "
            f"choose from {', '.join(FLIPS)} and from {', '.join(STYLES)}"
        )
    path = Path(path)
    root, files = (path.parent, [path]) if path.is_file() else (path, sorted(_files(walk(path))))
    pool = Hdf5Pool()
    demos: list[_Demo] = []
    for file in files:
        id = file.relative_to(root).with_suffix("").as_posix()
        try:
            demos += [_Demo(file, f"{id}/{key}", key) for key in _demonstrations(pool, file, mask)]
        except ValueError as error:  # one entry for the file, so that it is counted
            demos.append(_Demo(file, id, fault=str(error)))
    if all(demo.fault for demo in demos):
        reason = demos[0].fault if demos else f"{path} has no {' or '.join(SUFFIXES)} file"
        raise ValueError(f"no demonstrations in {path}: {reason}")
    if len({demo.id for demo in demos}) < len(demos):
        raise ValueError(f"{path} has files that differ only in the suffix; move one of them away")
    dataset = _Dataset(name, embodiment, fps, flip, instruction, instruction_style, demos, pool)
    return LazyEpisodes(len(demos), dataset.load)


def _files(visits: Iterator[Visit]) -> Iterator[Path]:
    return (folder / n for folder, _, names in visits for n in names if n.endswith(SUFFIXES))


def _demonstrations(pool: Hdf5Pool, path: Path, mask: str | None) -> list[str]:
    """Names below data/ in the order of their numbers."""
    with pool.open(path) as file:
        if not isinstance(file.get("data"), h5py.Group):
            raise ValueError(f"{path} has no demonstrations: it has no group `data`")
        names = [n for n in file["data"] if n.startswith("demo_") and n[5:].isdecimal()]
        if mask is not None:
            if f"mask/{mask}" not in file:
                known = sorted(file["mask"]) if "mask" in file else "none"
                raise ValueError(f"{path} has no mask {mask!r}; its masks are {known}")
            chosen = {_string(n) for n in file[f"mask/{mask}"][()]}
            if missing := sorted(chosen.difference(names)):
                raise ValueError(f"{path}: the mask {mask!r} lists {missing[0]}, which is missing")
            names = [n for n in names if n in chosen]
    if not names:
        raise ValueError(f"{path} has no demonstrations (data/demo_<number>)")
    return sorted(names, key=lambda n: (int(n[5:]), n))


@dataclass(frozen=True)
class _Demo:
    file: Path
    id: str
    key: str = ""  # below data/
    fault: str = ""


@dataclass(frozen=True)
class _Dataset:
    name: str
    embodiment: str
    fps: float | None
    flip: str
    instruction: str | None
    style: str
    demos: list[_Demo]
    pool: Hdf5Pool = field(repr=False)

    def load(self, index: int) -> Episode:
        demo = self.demos[index]
        if demo.fault:
            raise ValueError(demo.fault)
        with self.pool.open(demo.file) as file:
            data, group = file["data"], file["data"][demo.key]
            where = f"{demo.file}: {demo.key}"
            if not isinstance(group, h5py.Group):
                raise ValueError(f"{where} is not a group")
            arrays = _arrays(group)
            length = _length(where, group, arrays)
            times = np.round(np.arange(length) / self._rate(data) * NANOSECONDS).astype(np.int64)
            streams, cameras = {}, []
            for key, array in arrays.items():
                if len(array) != length:
                    if key.startswith("obs/"):
                        raise ValueError(
                            f"{where} has {length} actions but {len(array)} values of {key}"
                        )
                    continue  # outside obs/ not every array has one value per step
                if array.ndim == 4 and array.shape[-1] == 3 and array.dtype == np.uint8:
                    cameras.append(key)
                    frames = Hdf5Frames(demo.file, array.name, array.shape, self.flip, self.pool)
                    streams[key] = Stream(times, frames)
                elif array.ndim < 4:  # the others are depth maps and the like
                    streams[key] = Stream(times, array[()])
            return Episode(
                id=demo.id,
                source=self.name,
                embodiment=self.embodiment,
                instructions=(self._instruction(data, group, demo.file),),
                streams=streams,
                cameras=tuple(cameras),
            )

    def _rate(self, data: h5py.Group) -> float:
        if self.fps is not None:
            return self.fps
        kwargs = _json_attribute(data, "env_args").get("env_kwargs")
        rate = (kwargs if isinstance(kwargs, dict) else {}).get("control_freq") or LIBERO_HZ
        if not isinstance(rate, int | float) or rate <= 0:
            raise ValueError(
                f"{data.file.filename}: control_freq is {rate!r}; set the option fps to the steps "
                "per second"
            )
        return float(rate)

    def _instruction(self, data: h5py.Group, demo: h5py.Group, file: Path) -> str:
        """The instruction of a demonstration; "" if there is none."""
        words = file.stem.removesuffix("_demo")
        if self.instruction is not None:
            text = self.instruction
        elif self.style == "release":
            text = words.replace("_", " ").replace("black bowl", "bowl") + "."
        else:
            stored = _json_attribute(data, "problem_info").get("language_instruction")  # LIBERO's
            stored = stored or _json_attribute(demo, "ep_meta").get("lang")  # RoboCasa's
            text = _SCENE.sub("", words).replace("_", " ") if words != file.stem else ""
            if stored and isinstance(stored, str | list):
                # LIBERO has some as lists of characters, and some in quotes.
                text = "".join(map(str, stored)).strip().strip('"')
        if not text.isprintable():  # h5py turns bytes that are not UTF-8 into surrogates
            raise ValueError(f"{file}: the instruction {text!r} is not printable UTF-8 text")
        return text


def _arrays(group: h5py.Group) -> dict[str, h5py.Dataset]:
    """Numeric arrays of a demonstration and of its `obs`, by path."""
    found: dict[str, h5py.Dataset] = {}
    for prefix, part in (("", group), ("obs/", group.get("obs"))):
        for key in sorted(part) if isinstance(part, h5py.Group) else ():
            array = part[key]
            if isinstance(array, h5py.Dataset) and array.ndim and array.dtype.kind in "biuf":
                found[prefix + key] = array
    return found


def _length(where: str, group: h5py.Group, arrays: dict[str, h5py.Dataset]) -> int:
    """The number of actions, which must be what the file declares."""
    if "actions" not in arrays:
        raise ValueError(f"{where} has no array `actions`")
    length = len(arrays["actions"])
    if length == 0:
        raise ValueError(f"{where} is empty; leave it out")
    declared = group.attrs.get("num_samples", length)  # LIBERO has strings and numbers
    if _string(declared) != str(length):
        raise ValueError(
            f"{where} should have {_string(declared)} samples but has {length} actions; copy or "
            "write the file again"
        )
    return length


def _json_attribute(group: h5py.Group, key: str) -> dict[str, Any]:
    """A JSON object in an attribute; empty if it is missing or something else."""
    text = _string(group.attrs.get(key, "{}"))  # outside `try`: another encoding is an error
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _string(value: Any) -> str:
    """A text that h5py may return as bytes or as str."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
