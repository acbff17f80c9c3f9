"""Adapters between robots' clients and the policy, one for each value of `--client`.

To add one, write a function that returns an `Adapter` for the robot that a policy was trained on,
and add it to `CLIENTS`. It must refuse every policy whose robot, cameras or vectors are not the
client's: arrays of equal widths need not mean the same.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_pipelines.vectors import bases
from mvjax.policy.robot import Robot, check_present, described, last_word
from mvjax.serving.conversions import (
    Adapter,
    check_rotations,
    columns_by_stream,
    converted,
    expressed_anew,
    state_streams,
    stored_widths,
)
from mvjax.serving.openpi_robots import aloha, droid, droid_joint_position, libero

log = logging.getLogger(__name__)


def plain(robot: Robot) -> Adapter:
    """This package's own client: a picture of each camera, the policy's own vectors."""
    relative = bases(robot.action)
    if relative:
        log.warning(
            "the policy's actions are relative to %s (%s), and --client=plain returns them so: a "
            "robot that executes them as recorded needs --client=dataset.",
            *(", ".join(relative), described(robot.action)),
        )

    def proprio(states: np.ndarray) -> np.ndarray:
        check_rotations(robot.proprio, states)
        return states

    return Adapter(
        name="plain",
        images=own_images(robot.cameras),
        state=("observation/state",),
        state_size=robot.proprio_dim,
        proprio=proprio,
        # Those that are relative to an earlier moment mean something else now.
        pending=None if relative else lambda actions, state: actions,
    )


def dataset(robot: Robot) -> Adapter:
    """A robot that sends and takes the numbers of its dataset, whatever the policy makes of them.

    The state is what the dataset's streams hold at this moment, one stream after the other: those
    of the proprioception, then those that actions are relative to. Actions come back as the dataset
    stores them: differences from the present joints, for example, are absolute again.
    """
    who = "--client=dataset"
    widths = stored_widths(robot)
    learned = columns_by_stream(robot.action, robot.action_dim)
    if not robot.proprio or not learned:
        raise ValueError(f"{who} needs a policy whose datasets describe its state and actions.")
    for name, columns in learned.items():
        if missing := set(range(max(columns) + 1)) - columns:
            raise ValueError(
                f"{who} returns the stream {name!r} as the dataset stores it, but this policy did "
                f"not learn its columns {sorted(missing)}: use --client=plain, which returns the "
                f"policy's own {robot.action_dim} numbers."
            )
    names = state_streams(robot)
    ends = np.cumsum([widths[name] for name in names])

    def split(state: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, np.split(state, ends[:-1], axis=-1)))

    own = Adapter(
        name="dataset",
        images=own_images(robot.cameras),
        state=("observation/state",),
        state_size=int(ends[-1]),
    )
    return replace(converted(own, robot, split), pending=expressed_anew(robot, split))


def own_images(cameras: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The keys of the pictures of a policy's cameras in messages of this package's clients.

    One is "observation/image"; several are "observation/images/" and the last word of the camera's
    name, or the whole name where two last words are equal.

    Raises:
        ValueError: the history of one camera would have the key of another's picture.
    """
    if len(cameras) < 2:
        return dict.fromkeys(cameras or ("",), ("observation/image",))
    words = [*map(last_word, cameras)]
    names = words if len(set(words)) == len(words) else cameras
    for name in names:
        if f"{name}_history" in names:
            raise ValueError(
                f"This policy was trained on the cameras {name!r} and '{name}_history', but in "
                f"messages 'observation/images/{name}_history' is the history of {name!r}: give "
                "one of the streams another name, encode again and train again."
            )
    return {camera: (f"observation/images/{name}",) for camera, name in zip(cameras, names)}


CLIENTS = {
    "plain": plain,
    "dataset": dataset,
    "libero": libero,
    "aloha": aloha,
    "droid": droid,
    "droid_joint_position": droid_joint_position,
}


def make_adapter(client: str, robot: Robot) -> Adapter:
    """Returns the adapter of a client for a policy that was trained on `robot`.

    Raises:
        ValueError: the client is unknown, or its robot, cameras or numbers are not the policy's.
    """
    if client not in CLIENTS:
        raise ValueError(f"The client must be one of {', '.join(CLIENTS)}, got {client!r}.")
    if client != "plain":  # whose vectors are the client's own affair
        check_present(robot, f"--client={client}")
    adapter = CLIENTS[client](robot)
    if adapter.control_hz and robot.action_fps and adapter.control_hz != robot.action_fps:
        log.warning(
            "--client=%s executes %g actions per second, but those of the policy are %g per second "
            "(policy_io.action.fps): the robot moves at another speed than in training.",
            client,
            adapter.control_hz,
            robot.action_fps,
        )
    return adapter
