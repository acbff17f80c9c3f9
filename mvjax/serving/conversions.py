"""What an adapter is, and how its numbers become a policy's: streams, representations, rotations.

`adapters.py` and `openpi_robots.py` make adapters of these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipelines.representations import REPRESENTATIONS, ROTATION_WIDTHS, Mode, Part
from data_pipelines.vectors import bases, dims, restore, streams, vector
from mvjax.policy.robot import Robot, described


@dataclass(frozen=True)
class Adapter:
    """How one kind of client encodes its observations and actions.

    Attributes:
        name: the value of `--client`.
        images: the policy's camera ("" if it is not known) -> nested keys of its picture, uint8
            [h, w, 3] or [3, h, w].
        state: keys whose values, concatenated, are the robot's state.
        state_size: size of the state.
        proprio: states [h, state_size] -> the policy's proprioception [h, proprio_dim].
        actions: the policy's chunk [horizon, action_dim] and the state [state_size] it starts from
            -> the client's actions [horizon, any].
        pending: its inverse, for what a client still has to execute: [n, any] and the present state
            -> the policy's actions [n, action_dim]; None for clients that do not say it.
        prompt: the client's instruction -> the policy's.
        jump: a new episode begins when the first three numbers of the state (metres) move farther
            than this between two messages; None: only when the message says so.
        control_hz: actions that the client executes per second; 0 if unknown.
        execute: actions of a chunk that the client executes as openpi's examples set it; 0 if
            unknown.
        signed_gripper: the number of the policy's action that opens the client's gripper when it is
            negative and closes it when it is positive; None if it is converted.
    """

    name: str
    images: Mapping[str, tuple[str, ...]]
    state: tuple[str, ...]
    state_size: int
    proprio: Callable[[np.ndarray], np.ndarray] = lambda states: states
    actions: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda chunk, state: chunk
    pending: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    prompt: Callable[[str], str] = str
    jump: float | None = None
    control_hz: float = 0.0
    execute: int = 0
    signed_gripper: int | None = None


def in_own_layout(own: Adapter, robot: Robot, action_size: int) -> Adapter:
    """Returns the adapter of a policy whose streams are the client's own state and actions.

    Raises:
        ValueError: the policy reads several streams, or others than the client's numbers.
    """
    states, taken = state_streams(robot), streams(robot.action)
    fits = len(states) == len(taken) == 1 and _columns(robot.action, robot.action_dim) == set(
        range(action_size)
    )
    fits = fits and _columns(robot.proprio, robot.proprio_dim) <= set(range(own.state_size))
    whole = [part for part in robot.proprio if part.columns is None]  # the stream as it is
    if not fits or (whole and robot.proprio_dim != own.state_size):
        raise not_fitting(own, robot, f"{own.state_size} numbers", f"{action_size} numbers")
    return converted(own, robot, lambda state: {name: state for name in states})


def not_fitting(own: Adapter, robot: Robot, state: str, actions: str) -> ValueError:
    """The error of a policy whose vectors are not made of what a client sends and takes."""
    return ValueError(
        f"--client={own.name} has a state of {state} and takes actions of {actions}, but this "
        f"policy was trained with a state of {robot.proprio_dim} ({described(robot.proprio)}) and "
        f"actions of {robot.action_dim} ({described(robot.action)}): choose the --client that fits "
        "it, or plain."
    )


def converted(
    adapter: Adapter, robot: Robot, split: Callable[[np.ndarray], Mapping[str, np.ndarray]]
) -> Adapter:
    """Returns an adapter that converts between the client's streams and the policy's vectors.

    Args:
        adapter: of the client, without conversion.
        robot: the policy's; `split` must return all its streams and bases.
        split: a client's state [..., state_size] -> streams by name, [..., any].
    """

    def proprio(states: np.ndarray) -> np.ndarray:
        check_angles(robot.proprio, split(states))
        return vector(robot.proprio, split(states), split(states[-1]), robot.proprio_dim)

    def actions(chunk: np.ndarray, state: np.ndarray) -> np.ndarray:
        restored = restore(robot.action, chunk, split(state))
        flat = [restored[name].reshape(len(chunk), -1) for name in streams(robot.action)]
        return np.concatenate(flat, axis=1).astype(np.float32)

    return replace(adapter, proprio=proprio, actions=actions)


def expressed_anew(
    robot: Robot, split: Callable[[np.ndarray], Mapping[str, np.ndarray]]
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """`Adapter.pending` of an adapter that `converted` made with this `split`.

    Actions as the dataset stores them are expressed again, relative to the present state.
    """
    learned, names = columns_by_stream(robot.action, robot.action_dim), streams(robot.action)
    ends = np.cumsum([max(learned[name]) + 1 for name in names])

    def pending(actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        if actions.shape[1] != ends[-1]:
            raise ValueError(f"actions have {ends[-1]} numbers, not {actions.shape[1]}")
        stored = dict(zip(names, np.split(actions, ends[:-1], axis=1)))
        return vector(robot.action, stored, split(state), robot.action_dim)

    return pending


def check_rotations(parts: Sequence[Part], vectors: np.ndarray) -> None:
    """Raises ValueError where a policy's vectors [..., dim] hold no rotation, but should."""
    widths = dims(parts, vectors.shape[-1]) if parts else ()
    for part, end in zip(parts, np.cumsum(widths)):
        if part.represent not in ("rotation", "pose", "relative_pose"):
            continue
        rows = vectors[..., end - 6 : end].reshape(*vectors.shape[:-1], 2, 3)
        if np.abs(rows @ rows.swapaxes(-1, -2) - np.eye(2)).max() > 0.05:
            raise ValueError(
                f"numbers {end - 6} to {end - 1} must be the first two rows of a rotation matrix "
                f"({'/'.join(part.streams)}), which are of length 1 and at right angles; got "
                f"{np.round(vectors[..., end - 6 : end].reshape(-1, 6)[-1], 3).tolist()}."
            )


def check_angles(parts: Sequence[Part], values: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for angles that are larger than those of any rotation in radians."""
    # axis-angle is at most a full turn; Euler angles may have been counted on.
    turns = {"rotvec": 1, "euler_xyz": 2}
    for part in parts:
        if part.rotation in turns:
            stored = values[part.streams[-1]]
            stored = stored[..., part.columns or slice(-3, None)]
            largest = float(np.abs(stored).max())
            if largest > turns[part.rotation] * 2 * np.pi + 0.01:
                raise ValueError(
                    f"{part.streams[-1]!r} holds a rotation ({part.rotation}) in radians, at most "
                    f"{turns[part.rotation] * 2 * np.pi:.2f}, but got {largest:.4g}: are these "
                    "degrees?"
                )


def state_streams(robot: Robot) -> tuple[str, ...]:
    """The streams of a state that a policy reads or is relative to."""
    names = (*streams(robot.proprio), *bases(robot.proprio), *bases(robot.action))
    return tuple(dict.fromkeys(names))


def _columns(parts: Sequence[Part], dim: int) -> set[int]:
    """The columns that parts take of their only stream."""
    return set().union(*columns_by_stream(parts, dim).values())


def columns_by_stream(parts: Sequence[Part], dim: int) -> dict[str, set[int]]:
    """The columns that parts take of each stream."""
    taken: dict[str, set[int]] = {}
    for part, width in zip(parts, dims(parts, dim)):
        for name, columns in _columns_of(part, part.streams, part.columns, width):
            taken.setdefault(name, set()).update(columns)
    return taken


def stored_widths(robot: Robot) -> dict[str, int]:
    """How many numbers a policy reads of each stream of a state, up to the last one it takes."""
    widths: dict[str, int] = {}
    for parts, dim in ((robot.proprio, robot.proprio_dim), (robot.action, robot.action_dim)):
        for part, width in zip(parts, dims(parts, dim)):
            found = _columns_of(part, part.bases, part.base_columns, width)
            if parts is robot.proprio:
                found += _columns_of(part, part.streams, part.columns, width)
            for name, columns in found:
                widths[name] = max(widths.get(name, 0), max(columns) + 1)
    return widths


def _columns_of(
    part: Part, names: Sequence[str], columns: Sequence[int] | None, width: int
) -> list[tuple[str, Sequence[int]]]:
    """The columns that a part takes of its streams or bases, which are one name or two."""
    if len(names) == 2:  # position and rotation
        sizes = (3, ROTATION_WIDTHS[part.rotation])
    else:
        sizes = (REPRESENTATIONS[part.represent].stored_width(part) or width,)
    return [(name, columns or range(size)) for name, size in zip(names, sizes)]


def number_of(robot: Robot, column: int) -> int | None:
    """The number of a policy's action that is a column of its only stream, as it is."""
    widths = dims(robot.action, robot.action_dim)
    for part, width, end in zip(robot.action, widths, np.cumsum(widths)):
        columns = list(part.columns or range(width))
        if part.represent == "values" and column in columns:
            return int(end) - width + columns.index(column)
    return None


def meaning(parts: Sequence[Part]) -> list[Part]:
    """Parts without what does not change the layout of a vector."""
    same = dict(normalize=Mode.VARIANCE, shift=0.0, interpolation="nearest")
    return [replace(part, **same) for part in parts]
