"""A connection's episode: builds the policy's observations from a client's messages."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from mvjax.policy.observation import Observation
from mvjax.serving.conversions import Adapter
from mvjax.serving.messages import (
    RequestError,
    find,
    has,
    read_numbers,
    read_picture,
    read_pictures,
    read_prompt,
)
from mvjax.serving.notices import Camera, Notices, Ranges, Trained, unread_pictures

IMAGE_HISTORY, STATE_HISTORY = "observation/image_history", "observation/state_history"
PENDING, DELAY = "pending/actions", "pending/delay"


@dataclass(frozen=True)
class SessionSpec:
    """The policy's input.

    Attributes:
        observed_frames, proprio_horizon: lengths of the histories.
        prompt: the instruction for clients that send none; "" if they must.
        cameras: what training says of the pictures of each camera; {}: pictures of any aspect will
            do, and nothing is said of them.
        fps, proprio_fps: pictures and states per second in the histories; 0 if unknown.
        proprio, actions: what training saw of the vectors, if it is known.
        chunking: how chunks continue what a client still has to execute (`sampler.chunking`).
        action_size: numbers of the policy's action; only read where chunks continue others.
        longest_delay: the largest number of actions that it may execute meanwhile.
    """

    observed_frames: int
    proprio_horizon: int
    prompt: str = ""
    cameras: Mapping[str, Trained] = field(default_factory=dict)
    fps: float = 0.0
    proprio_fps: float = 0.0
    proprio: Ranges | None = None
    actions: Ranges | None = None
    chunking: str = "none"
    action_size: int = 0
    longest_delay: int = 0


class Seen(NamedTuple):
    """An observation, and the present state in the client's own layout [state_size]."""

    observation: Observation
    state: np.ndarray


class _Episode(NamedTuple):
    """The latest pictures and states of messages without histories, and their instruction."""

    pictures: tuple[Mapping[str, np.ndarray], ...]  # one of each camera
    states: tuple[np.ndarray, ...]
    prompt: str | None


class Session:
    """Builds one connection's observations.

    A message with the histories of all cameras (`history_keys`) is complete in itself and does
    not change the episode. Single pictures, one of each camera, are appended to those of the
    episode's earlier messages (so the messages' rate is the pictures'), and the first ones are
    repeated as in training if there are too few. So are the states, unless the message has their
    history. A new prompt, `"reset": True` or a jump of the robot begins a new episode.

    Args:
        adapter: of the client.
        spec: the policy's input.
        numbers: numbers the episodes of all sessions of a server, in the order of their first
            queries; the noise of a query is named by the episode's and its own.
        notices: what this connection is told once.
    """

    def __init__(
        self, adapter: Adapter, spec: SessionSpec, numbers: Iterator[int], notices: Notices
    ) -> None:
        self._adapter, self._spec, self._numbers = adapter, spec, numbers
        self._history_keys = history_keys(adapter)
        # Where there are several, what is said of a camera begins with its name.
        self._said = {name: name if len(adapter.images) > 1 else "" for name in adapter.images}
        self._cameras = {
            name: Camera(trained, self._said[name]) for name, trained in spec.cameras.items()
        }
        self.notices = notices
        self.reset()

    def reset(self) -> None:
        """Begins a new episode."""
        self._episode = _Episode((), (), None)
        self._names: Iterator[tuple[str, int]] | None = None  # of the queries of this episode
        # Of each camera its picture and the first state with it.
        self._still: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def observe(self, message: Mapping[str, Any]) -> Seen:
        """Reads a message; a refused one does not change the episode.

        Raises:
            RequestError: something is missing, of a wrong shape or type, too large, or not finite.
        """
        adapter, spec = self._adapter, self._spec
        prompt = read_prompt(message, spec.prompt)
        if any(has(message, keys) for keys in self._history_keys.values()):
            frames, states = self._histories(message), self._state_history(message)
            self._check_last(message, frames, states[-1])
            observation = self._observation(frames, states, prompt)
            observation = self._continuing(observation, message, states[-1])
            self._note_unread(message, self._history_keys)
            return Seen(self._named(observation), states[-1])
        picture, state = self._pictures(message), self._state(message)
        history = self._state_history(message) if self._needs_states(message) else None
        if history is not None:
            self._check_last(message, {}, history[-1])
        pictures, states = (), ()
        begins = self._begins(prompt, picture, state)
        if not begins:
            pictures, states, _ = self._episode
        # Copies, because a view would keep its whole message in memory.
        copied = {camera: shown.copy() for camera, shown in picture.items()}
        pictures = (*pictures, copied)[-spec.observed_frames :]
        states = (*states, state.copy())[-spec.proprio_horizon :]
        observation = self._observation(
            {
                camera: _padded([shown[camera] for shown in pictures], spec.observed_frames)
                for camera in picture
            },
            _padded(states, spec.proprio_horizon) if history is None else history,
            prompt,
        )
        observation = self._continuing(observation, message, state)
        self._note_unread(message, adapter.images)
        if begins:
            self.reset()
        self._episode = _Episode(pictures, states, prompt)
        return Seen(self._named(observation), state)

    def actions(self, chunk: np.ndarray, seen: Seen) -> np.ndarray:
        """Returns the policy's chunk in the client's layout, float32 [horizon, any]."""
        if np.isfinite(chunk).all():
            known = self._spec.actions
            # A policy may reach a little farther than its demonstrations.
            if known is not None and (far := known.beyond(chunk, margin=0.5)):
                self.notices.add("actions_outside", _ACTIONS_OUTSIDE.format(far))
            actions = self._adapter.actions(chunk, seen.state)
            if np.isfinite(actions).all():
                return actions
        raise RequestError(
            "The policy's actions are NaN or infinite; is the state in the units of training?"
        )

    def _continuing(
        self, observation: Observation, message: Mapping[str, Any], state: np.ndarray
    ) -> Observation:
        """An observation with what the client still has to execute, if it says so."""
        if PENDING not in message and DELAY not in message:
            return observation
        if self._spec.chunking == "none":
            self.notices.add("pending_unread", _PENDING_UNREAD)
            return observation
        delay = message.get(DELAY, 0)
        value = find(message, [PENDING])
        if np.ndim(value) != 2:
            raise RequestError(f"{PENDING!r} must be actions [n, any], the next one first.")
        rest = read_numbers(value, PENDING, np.shape(value))
        if isinstance(delay, bool) or not isinstance(delay, int) or not 0 <= delay <= len(rest):
            raise RequestError(
                f"{DELAY!r} must be a whole number of actions between 0 and the {len(rest)} that "
                f"are pending, got {delay!r}."
            )
        if not len(rest):
            return observation
        try:
            pending = self._adapter.pending(rest, state)
        except ValueError as error:
            raise RequestError(f"{PENDING!r} is not valid: {error}.") from error
        if pending.shape[1] != self._spec.action_size or not np.isfinite(pending).all():
            raise RequestError(
                f"{PENDING!r} must be finite actions of {self._spec.action_size} numbers, as the "
                f"server's answers have them; got shape {list(rest.shape)}."
            )
        if delay > self._spec.longest_delay:
            # A robot in motion is better off with a jump than without an answer.
            self.notices.add("delay_long", _DELAY_LONG.format(delay, self._spec.longest_delay))
            delay = self._spec.longest_delay
        return replace(observation, pending=pending, delay=delay)

    def _named(self, observation: Observation) -> Observation:
        if self._names is None:
            self._names = zip(itertools.repeat(f"session {next(self._numbers)}"), itertools.count())
        return replace(observation, noise_key=next(self._names))

    def _observation(
        self, frames: Mapping[str, np.ndarray], states: np.ndarray, prompt: str
    ) -> Observation:
        adapter = self._adapter
        try:
            proprio = adapter.proprio(states)
        except ValueError as error:  # such as numbers that are no rotation
            raise RequestError(f"The state is not valid: {error}") from error
        if not np.isfinite(proprio).all():
            raise RequestError("The state has numbers that are too large.")
        if (known := self._spec.proprio) is not None:
            for camera, pictures in frames.items():
                self._note_still(camera, pictures[-1], proprio[-1], known)
            if clipped := known.clips(proprio):
                self.notices.add("state_clipped")
            # Two kinds: a slight excess, which is common, must not hide other units.
            for kind, margin in (("state_far_outside", 3.0), ("state_outside", 0.05)):
                if what := known.beyond(proprio, margin):
                    end = " They are clipped." if clipped else ""
                    self.notices.add(kind, _STATE[kind].format(what) + end)
                    break
        if self._cameras:
            frames = {name: self._cameras[name](f, self.notices) for name, f in frames.items()}
        return Observation(frames, proprio, adapter.prompt(prompt))

    def _note_still(
        self, camera: str, picture: np.ndarray, state: np.ndarray, known: Ranges
    ) -> None:
        before = self._still.get(camera)
        if before is None or not np.array_equal(picture, before[0]):
            self._still[camera] = picture.copy(), state
        elif known.differ(state, before[1]):
            self.notices.add(
                "picture_still",
                "The picture has not changed while the robot moved: has the camera stopped?",
                self._said[camera],
            )

    def _check_last(
        self, message: Mapping[str, Any], frames: Mapping[str, np.ndarray], state: np.ndarray
    ) -> None:
        """Refuses a picture or state beside a history that ends with another one."""
        adapter = self._adapter
        for camera, pictures in frames.items():
            name, history = "/".join(keys := adapter.images[camera]), self._history_keys[camera]
            if has(message, keys) and not np.array_equal(
                read_picture(find(message, keys), name), pictures[-1]
            ):
                raise RequestError(
                    f"{name!r} is not the last picture of {'/'.join(history)!r}: send only one of "
                    "them."
                )
        if STATE_HISTORY in message and has(message, adapter.state[:1]):
            if not np.array_equal(self._state(message), state):
                raise RequestError(
                    f"{adapter.state[0]!r} is not the last state of {STATE_HISTORY!r}: send only "
                    "one of them."
                )

    def _note_unread(self, message: Mapping[str, Any], read: Mapping[str, tuple[str, ...]]) -> None:
        """Says which pictures are not read; `read`: the camera -> the keys that were."""
        known = {*self._adapter.images.values(), *self._history_keys.values()}
        if unread := unread_pictures(message, known):
            seen = [
                f"{'/'.join(keys)!r}" + (f" (camera {camera!r})" if camera else "")
                for camera, keys in read.items()
            ]
            self.notices.add(
                "pictures_unread",
                f"{', '.join(map(repr, unread))} is not read: this policy sees {', '.join(seen)}.",
            )

    def _pictures(self, message: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Camera -> [h, w, 3], one of each."""
        return {
            camera: read_picture(find(message, keys, self._said[camera]), "/".join(keys))
            for camera, keys in self._adapter.images.items()
        }

    def _histories(self, message: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Camera -> [observed_frames, h, w, 3], of each."""
        return {
            camera: read_pictures(
                find(message, keys, self._said[camera]), "/".join(keys), self._spec.observed_frames
            )
            for camera, keys in self._history_keys.items()
        }

    def _state(self, message: Mapping[str, Any]) -> np.ndarray:
        """[state_size] from one key or several; a single number is a vector of one."""
        adapter = self._adapter
        if len(adapter.state) == 1:
            key = adapter.state[0]
            return read_numbers(find(message, [key]), key, (adapter.state_size,))
        parts = []
        for key in adapter.state:
            value = find(message, [key])
            parts.append(read_numbers(value, key, (len(value),) if np.ndim(value) else ()).ravel())
        sizes = [part.size for part in parts]
        if sum(sizes) != adapter.state_size:
            raise RequestError(
                f"{' and '.join(map(repr, adapter.state))} have {sizes} numbers; together they "
                f"must be {adapter.state_size}."
            )
        return np.concatenate(parts)

    def _state_history(self, message: Mapping[str, Any]) -> np.ndarray:
        """[proprio_horizon, state_size]; a single state if the policy takes one."""
        horizon = self._spec.proprio_horizon
        if STATE_HISTORY not in message and horizon == 1:
            return self._state(message)[None]
        value = find(message, [STATE_HISTORY])
        return read_numbers(value, STATE_HISTORY, (horizon, self._adapter.state_size))

    def _needs_states(self, message: Mapping[str, Any]) -> bool:
        """Whether the states are those of the message; the messages have the pictures' rate."""
        spec = self._spec
        if STATE_HISTORY not in message and spec.proprio_horizon > 1:
            if spec.fps != spec.proprio_fps:
                raise RequestError(
                    f"This policy reads {spec.proprio_horizon} states, {spec.proprio_fps:g} per "
                    f"second, but the states of earlier messages are {spec.fps:g} per second, like "
                    f"their pictures: send {STATE_HISTORY!r} [{spec.proprio_horizon}, "
                    f"{self._adapter.state_size}], too."
                )
        return STATE_HISTORY in message

    def _begins(self, prompt: str, picture: Mapping[str, np.ndarray], state: np.ndarray) -> bool:
        pictures, states, before = self._episode
        if not pictures or prompt != before:
            return True
        if any(shown.shape != pictures[-1][camera].shape for camera, shown in picture.items()):
            return True
        moved = np.linalg.norm(state[:3] - states[-1][:3])
        return self._adapter.jump is not None and bool(moved > self._adapter.jump)


_STATE = {
    "state_outside": "The state is outside the training data in {}.",
    "state_far_outside": (
        "The state is far outside the training data in {}; are its units those of training?"
    ),
}
_PENDING_UNREAD = (
    f"{PENDING!r} is not read: this server's chunks do not continue one another (sampler.chunking)."
)
_DELAY_LONG = (
    "The answer is expected after {} actions, but only the first {} of a chunk can be held: there "
    "may be a jump. Answer faster, or serve a decoder trained with a larger flow.prefix."
)
_ACTIONS_OUTSIDE = "The policy's actions are far outside the training data in {}."


def _padded(newest: Sequence[np.ndarray], count: int) -> np.ndarray:
    """[count, ...] with the oldest one repeated in front."""
    return np.stack([newest[0]] * (count - len(newest)) + [*newest])


def history_keys(adapter: Adapter) -> dict[str, tuple[str, ...]]:
    """The policy's camera -> nested keys of its last pictures, uint8 [observed_frames, h, w, 3].

    That of the only camera is "observation/image_history", whatever the client. Those of several
    are beside their single pictures, whose keys they extend.
    """
    if len(adapter.images) == 1:
        return dict.fromkeys(adapter.images, (IMAGE_HISTORY,))
    return {camera: (*keys[:-1], f"{keys[-1]}_history") for camera, keys in adapter.images.items()}
