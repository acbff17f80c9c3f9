"""The robot that a policy was trained on: its vectors, its cameras, its name.

Whoever shows a policy pictures and states of his own (a server, a simulator) checks here that they
are those of training: arrays of equal widths need not mean the same.
"""

import importlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.augment import Augment
from data_pipelines.cameras import View, camera_rows, dataset_views, view_cameras, view_rows
from data_pipelines.representations import REPRESENTATIONS, Mode, Part
from data_pipelines.settings import differences, plain
from data_pipelines.vectors import dims, parse

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Robot:
    """A robot as the datasets of a policy describe it.

    Attributes:
        action, proprio: the parts (`data_pipelines.vectors`) of the policy's vectors; the shifts of
            `proprio` are from the present.
        action_dim, proprio_dim: their widths.
        embodiment: its name, `dataset.embodiment`; "" if the datasets do not name it.
        dataset: the dataset whose words these are.
        views: the pictures that the policy sees and their cameras; () if they are not known.
        action_fps: actions per second; 0 if unknown.
        flip: how HDF5 files were read (`options.flip`); "" for other formats.
    """

    action: tuple[Part, ...]
    proprio: tuple[Part, ...]
    action_dim: int
    proprio_dim: int
    embodiment: str = ""
    dataset: str = ""
    views: tuple[View, ...] = ()
    action_fps: float = 0.0
    flip: str = ""

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras of all views, the clock first; () if they are not known."""
        return view_cameras(self.views)


def trained_robot(config: Any) -> Robot:
    """Returns the robot that a policy is trained for: `config.embodiment`, or the only one.

    Raises:
        ValueError: it is not among the datasets with actions, there are several to choose from, or
            two of its datasets describe it differently.
    """
    io, wanted = config.policy_io, config.get("embodiment") or ""
    acting = {key: dataset for key, dataset in config.datasets.items() if dataset.action}
    names = list(dict.fromkeys(dataset.get("embodiment") or "" for dataset in acting.values()))
    known = ", ".join(map(repr, names))
    if wanted and wanted not in names:
        raise ValueError(
            f"config.embodiment is {wanted!r}, but the datasets with actions are of {known}: "
            "--config.embodiment=NAME selects one of these."
        )
    if not wanted and len(names) > 1:
        raise ValueError(
            f"This policy was trained on several robots, {known}: choose the one to control with "
            "--config.embodiment=NAME."
        )
    robots = [
        Robot(
            parse(dataset.action, "action"),
            tuple(
                replace(part, shift=part.shift + io.proprio.get("shift", 0.0))
                for part in parse(dataset.proprio, "proprio")
            ),
            io.action.dim,
            io.proprio.dim,
            embodiment=dataset.get("embodiment") or "",
            dataset=key,
            views=dataset_views(dataset, config.clip),
            action_fps=io.action.get("fps", 0.0),
            flip=_flip(dataset),
        )
        for key, dataset in acting.items()
        if wanted in ("", dataset.get("embodiment") or "")
    ]
    if not robots:
        return Robot((), (), io.action.dim, io.proprio.dim, embodiment=wanted)
    first = robots[0]
    for other in robots[1:]:
        if _kinds(other) != _kinds(first):
            raise ValueError(
                f"The datasets {first.dataset!r} and {other.dataset!r} of the robot "
                f"{first.embodiment!r} describe its vectors differently ({described(first.action)} "
                f"from {described(first.proprio)}; {described(other.action)} from "
                f"{described(other.proprio)}), so the meaning of the policy's actions is not known:"
                " give them the same parts, or different embodiments, and train again."
            )
    # Of several cameras that were learned as videos of their own, one is enough. What is black in
    # one dataset alone must not be black for the policy.
    return min(robots, key=lambda robot: (_black_cells(robot), len(robot.cameras)))


def _black_cells(robot: Robot) -> int:
    return sum(not camera for view in robot.views for row in view.rows for camera in row)


def _flip(dataset: Any) -> str:
    hdf5 = dataset.get("format") == "robomimic_hdf5"
    return (dataset.get("options") or {}).get("flip", "none") if hdf5 else ""


def check_turned(robot: Robot, who: str) -> None:
    """Warns if LIBERO's pictures were not turned for training as `who` turns them.

    Its files hold them upside down, and turning is not mirroring. Whether other files do, they do
    not say.
    """
    if robot.flip not in ("", "rotate"):
        log.warning(
            "the policy was trained on HDF5 files with the option flip=%r, but %s shows pictures "
            "that are turned by 180 degrees, as flip='rotate' turns LIBERO's own: it sees them "
            "upside down or mirrored unless the files differ from LIBERO's.",
            *(robot.flip, who),
        )


def check_present(robot: Robot, who: str) -> None:
    """Raises ValueError for a policy of states of another moment than `who` shows it."""
    for part in robot.proprio:
        if part.shift:
            raise ValueError(
                f"This policy was trained on {'/'.join(part.streams)} of {part.shift:g} s from the "
                f"present (shift), but {who} shows it the present state: train without a shift."
            )


def match_cameras(robot: Robot, known: Mapping[str, Sequence[str]], who: str) -> dict[str, str]:
    """Which of another's cameras shows what each camera of a policy showed in training.

    A policy's camera of a name that is not known is taken for the main one, with a warning, if none
    of its cameras has that name and its own does not say that it is on the hand. Of a policy whose
    cameras are not known, "" is the main one.

    Args:
        robot: of the policy.
        known: the other's cameras, the main one first -> last words of the names that datasets call
            it by, as `CAMERAS` of data_pipelines/embodiments.
        who: has these cameras.

    Returns:
        camera of the policy -> key of `known`, of all cameras of the policy.

    Raises:
        ValueError: the policy sees a camera that `who` does not have.
    """
    main = next(iter(known))
    named = {word: camera for camera, words in known.items() for word in words}
    found = {name: named.get(last_word(name)) for name in robot.cameras or ("",)}
    unknown = [name for name, camera in found.items() if camera is None]
    if unknown and (len(unknown) > 1 or main in found.values() or _is_on_the_hand(unknown[0])):
        listed = ", ".join(f"{words[0]!r}" for words in known.values())
        raise ValueError(
            f"This policy was trained on the camera {unknown[0]!r}, which {who} does not have; it "
            f"has {listed}."
        )
    if unknown and unknown[0]:
        log.warning(
            "the policy was trained on the camera %r, a name that %s does not know: it is shown "
            "%r, which must be the same view.",
            *(unknown[0], who, known[main][0]),
        )
    # Two cameras of a policy that are one of `who`'s would show the same view twice.
    shown = {name: camera or main for name, camera in found.items()}
    for camera in known:
        if len(twice := [name for name, taken in shown.items() if taken == camera]) > 1:
            raise ValueError(
                f"This policy was trained on the cameras {twice[0]!r} and {twice[1]!r}, which are "
                f"both {known[camera][0]!r} of {who}: it would see the same view twice."
            )
    return shown


def check_trained(config: Any, meta: Mapping[str, Any], directory: Path) -> None:
    """Compares what a configuration says of its datasets with what a policy was trained on.

    Args:
        config: of stage 2.
        meta: of the policy's checkpoint; converted weights do not know their data and pass.
        directory: of the checkpoint, for messages.

    Raises:
        ValueError: vectors, cameras or lengths differ, so that the policy's numbers would be read
            with other words than they were learned with.
    """
    trained = meta.get("config", {})
    if "datasets" not in trained:
        return
    before, now = _learned(trained), _learned(config)
    different = []
    for name, described in before["datasets"].items():
        if name in now["datasets"]:
            different += differences(described, now["datasets"][name], f"datasets.{name}")
    if not before["datasets"].keys() & now["datasets"].keys():
        different += [f"datasets is {[*before['datasets']]} there, {[*now['datasets']]} here"]
    for section in ("clip", "policy_io"):
        different += differences(before[section], now[section], section)
    if different:
        raise ValueError(
            f"{directory} was trained with other settings than this configuration has: "
            f"{'; '.join(different)}. Use those of training (without --config, the checkpoint's "
            "own configuration is used)."
        )
    for name, described in before["datasets"].items():
        where = trained["datasets"][name].get("records")
        manifest = Path(where or "") / "manifest.json"
        if not where or not manifest.exists():
            continue
        records = json.loads(manifest.read_text())
        if records.get("fingerprint") not in meta.get("data_fingerprint", ()):
            continue  # they were encoded again since then
        of_records = records["settings"]
        encoded = plain(_words(of_records["dataset"], of_records["clip"].get("views") or ()))
        if different := differences(encoded, described, f"datasets.{name}"):
            raise ValueError(
                f"{directory} was trained on records that do not match its configuration "
                f"({manifest.parent}: {'; '.join(different)}), so the meaning of the policy's "
                "numbers is not known: encode again and train again."
            )


def check_embodiment(robot: Robot, who: str, word: str, example: str) -> None:
    """Raises ValueError unless `word` is in the name of a policy's robot, as it is in `example`."""
    if word in robot.embodiment.lower():
        return
    where = f"config.datasets.{robot.dataset}.embodiment" if robot.dataset else "embodiment"
    trained = repr(robot.embodiment) if robot.embodiment else "a robot without a name"
    raise ValueError(
        f"{_capital(who)} is for the robot {example!r}, but this policy was trained on {trained} "
        f"({where}; actions: {described(robot.action)}). If that is the same robot, say so with "
        f"--{where}={example}."
    )


def check_suite(robot: Robot, suite: str, embodiment: str, size: tuple[int, int]) -> dict[str, str]:
    """Raises ValueError unless a simulator's robot and cameras are those of a policy.

    Args:
        robot: of the policy.
        suite: the simulator's name.
        embodiment: of its robot, a file of data_pipelines/embodiments, which names its cameras.
        size: height and width of its pictures.

    Returns:
        camera of the policy -> camera of the simulator (see `match_cameras`).
    """
    who = f"the suite {suite!r}"
    if robot.embodiment:  # runs of earlier versions may lack the name
        check_embodiment(robot, who, suite, embodiment)
    own = importlib.import_module(f"data_pipelines.embodiments.{embodiment}")
    widths = dict(action_dim=robot.action_dim, proprio_dim=robot.proprio_dim)
    try:
        same = _kinds(robot) == _kinds(Robot(parse(own.ACTION), parse(own.PROPRIO), **widths))
    except ValueError:  # of another width
        same = False
    if not same:
        raise ValueError(
            f"{_capital(who)} has states of {described(parse(own.PROPRIO))} and takes actions of "
            f"{described(parse(own.ACTION))}; this policy was trained with "
            f"{described(robot.proprio)} and {described(robot.action)}: describe them as in "
            f"data_pipelines/embodiments/{embodiment}.py, and train again."
        )
    for name in ("ACTION", "PROPRIO"):
        known = [parse(value) for key, value in vars(own).items() if key.endswith(name)]
        _check_numbers(robot, name.lower(), known, who)
    cameras = match_cameras(robot, own.CAMERAS, who)
    check_present(robot, who)
    if embodiment == "libero_panda":
        check_turned(robot, who)
    for view in robot.views:
        # A tiled picture stretches its cameras as it did in training; a black one shows none.
        is_whole = sum(map(len, view.rows)) < 2 and view.rows != (("",),)
        if is_whole and not same_aspect(size, (view.height, view.width)):
            log.warning(
                "the pictures of the suite %r are %dx%d, but the policy's view %r is %dx%d: they "
                "are stretched, which is right only if the pictures of training were, too.",
                *(suite, *size, view.name, view.height, view.width),
            )
    return cameras


def check_gripper(least: float, number: str, who: str) -> None:
    """Raises ValueError for a gripper from 0 to 1 where negative numbers open it.

    Args:
        least: the smallest value that training saw; 1 of a gripper that only closes.
        number: its name.
        who: takes the actions.
    """
    if 0 <= least < 0.5:  # it would always be closed
        raise ValueError(
            f"{_capital(who)} opens the gripper with a negative number and closes it with a "
            f"positive one, but this policy learned {number} from data that are never below "
            f"{least:g}: train on -1 to 1."
        )


def _check_numbers(robot: Robot, vector: str, known: Sequence[tuple[Part, ...]], who: str) -> None:
    """Raises ValueError for a vector of a suite's streams, but with other or permuted numbers."""
    parts, dim = getattr(robot, vector), getattr(robot, f"{vector}_dim")
    taken = _taken(parts, dim)
    alike = [one for one in known if {n[0] for n in _taken(one, dim)} == {n[0] for n in taken}]
    if not alike:
        log.warning(
            "the %s of the policy was learned from %s, a name that %s does not know: make sure "
            "that the numbers are those of %s, in the same order.",
            *(vector, described(parts), who, who),
        )
    elif taken not in [_taken(one, dim) for one in alike]:
        raise ValueError(
            f"the {vector} of {who} is {', '.join(labels(alike[0], dim))}, but this policy was "
            f"trained with {', '.join(labels(parts, dim))}: train with the suite's."
        )


def _taken(parts: Sequence[Part], dim: int) -> list[tuple[Any, ...]]:
    """What each number of a vector is: the last word of its stream, and the column."""
    taken: list[tuple[Any, ...]] = []
    for part, width in zip(parts, dims(parts, dim)):
        stream = "/".join(map(last_word, part.streams))
        stored = REPRESENTATIONS[part.represent].stored_width(part) or width
        columns = part.columns or tuple(range(stored))
        single = part.represent in ("values", "delta", "gripper")
        taken += [(stream, c) for c in columns] if single else [(stream, columns, part.rotation)]
    return taken


def same_aspect(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Returns whether two sizes (height, width) have the same aspect within four percent.

    A clip's sides are multiples of 16, so 16:9 may be 176x320 there.
    """
    return abs(one[1] * other[0] / (one[0] * other[1]) - 1) < 0.04


def last_word(stream: str) -> str:
    """Returns the last word of a stream's name, such as "top" of "observation.images.top"."""
    return re.split(r"[/.]", stream)[-1]


def described(parts: Sequence[Part]) -> str:
    """Returns the streams of a vector and their representations, in words."""
    return ", ".join(
        f"{'/'.join(part.streams)} as {part.represent}" if part.streams else f"{part.pad} zeros"
        for part in parts
    )


def labels(parts: Sequence[Part], dim: int) -> list[str]:
    """Returns a name for each of the `dim` numbers of a vector, such as "observation.state[2]"."""
    if not parts:
        return [f"number {i}" for i in range(dim)]
    names = []
    for part, width in zip(parts, dims(parts, dim)):
        stream = "/".join(part.streams) or "zeros"
        if part.represent in ("values", "delta", "gripper") and not part.pad:
            names += [f"{stream}[{column}]" for column in part.columns or range(width)]
        else:
            names += [f"{stream} ({part.represent} {i})" for i in range(width)]
    return names


def _is_on_the_hand(camera: str) -> bool:
    """Returns whether a camera's name says that it is on the robot's hand."""
    return re.search("wrist|eye_in_hand|hand_?(cam|eye)|gripper", camera.lower()) is not None


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _kinds(robot: Robot) -> list[list[str]]:
    """The representation of every number of both vectors, however they are cut into parts."""
    vectors = (robot.action, robot.action_dim), (robot.proprio, robot.proprio_dim)
    return [
        np.repeat(["pad" if p.pad else p.represent for p in parts], dims(parts, dim)).tolist()
        for parts, dim in vectors
    ]


def _learned(config: Any) -> dict[str, Any]:
    """What decides the meaning of the numbers and pictures of a policy, in comparable form."""
    windows = {
        vector: {key: value for key, value in io.items() if key != "mask_padding"}
        for vector, io in config["policy_io"].items()
    }
    views = config["clip"].get("views") or ()
    acting = {key: _words(d, views) for key, d in config["datasets"].items() if d["action"]}
    return plain({"datasets": acting, "clip": config["clip"], "policy_io": windows})


def _words(dataset: Any, views: Iterable[str]) -> dict[str, Any]:
    parts = {
        name: {
            str(number): vars(replace(part, normalize=Mode.VARIANCE))
            for number, part in enumerate(parse(dataset[name], name))
        }
        for name in ("action", "proprio")
    }
    shown = dataset.get("views") or {}
    return parts | {
        "video": camera_rows(dataset["video"]),
        "views": {name: view_rows(shown[name]) for name in views if name in shown},
        "augment": {"crop": Augment.of(dataset).crop},  # all that a policy sees of it
    }
