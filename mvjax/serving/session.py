"""A connection's episode: builds the policy's observations from a client's messages.

`Session` keeps the episode; the functions below it read the parts of a message and check them.
"""

import itertools
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mvjax.policy.observation import Observation
from mvjax.serving.adapters import Adapter
from mvjax.serving.notices import Notices, Ranges, View, unread_pictures

IMAGE_HISTORY, STATE_HISTORY = "observation/image_history", "observation/state_history"
MAX_SIDE = 2048  # height and width of a picture, pixels
MAX_PROMPT = 1000  # characters


class RequestError(ValueError):
    """A message that cannot be answered; its text is sent to the client."""


@dataclass(frozen=True)
class SessionSpec:
    """The policy's input.

    Attributes:
        observed_frames, proprio_horizon: lengths of the histories.
        prompt: the instruction for clients that send none; "" if they must.
        clip: height and width of what the policy sees; None: pictures of any aspect will do.
        camera_size: height and width of the training pictures; None: they have the clip's aspect.
        camera: the name of the camera that the policy was trained on.
        fps, proprio_fps: pictures and states per second in the histories; 0 if unknown.
        proprio, actions: what training saw of the vectors, if it is known.
    """

    observed_frames: int
    proprio_horizon: int
    prompt: str = ""
    clip: tuple[int, int] | None = None
    camera_size: tuple[int, int] | None = None
    camera: str = ""
    fps: float = 0.0
    proprio_fps: float = 0.0
    proprio: Ranges | None = None
    actions: Ranges | None = None


class Seen(NamedTuple):
    """An observation, and the present state in the client's own layout [state_size]."""

    observation: Observation
    state: np.ndarray


class _Episode(NamedTuple):
    """The latest pictures and states of single-picture messages, and their instruction."""

    pictures: tuple[np.ndarray, ...]
    states: tuple[np.ndarray, ...]
    prompt: str | None


class Session:
    """Builds one connection's observations.

    A message with `observation/image_history` is complete in itself and does not change the
    episode. A single picture is appended to those of the episode's earlier messages (so the
    messages' rate is the pictures'), and the first one is repeated as in training if there are too
    few. So are the states, unless the message has their history. A new prompt, `"reset": True` or
    a jump of the robot begins a new episode.

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
        self._view = View(spec.clip, spec.camera_size) if spec.clip else None
        self.notices = notices
        self.reset()

    def reset(self) -> None:
        """Begins a new episode."""
        self._episode = _Episode((), (), None)
        self._names: Iterator[tuple[str, int]] | None = None  # of the queries of this episode
        self._still: tuple[np.ndarray, np.ndarray] | None = None  # a picture, the first state of it

    def observe(self, message: Mapping[str, Any]) -> Seen:
        """Reads a message; a refused one does not change the episode.

        Raises:
            RequestError: something is missing, of a wrong shape or type, too large, or not finite.
        """
        adapter, spec = self._adapter, self._spec
        prompt = read_prompt(message, spec.prompt)
        if IMAGE_HISTORY in message:
            pictures = read_pictures(message[IMAGE_HISTORY], IMAGE_HISTORY, spec.observed_frames)
            states = self._state_history(message)
            self._check_last(message, pictures[-1], states[-1])
            observation = self._observation(pictures, states, prompt)
            self._note_unread(message, (IMAGE_HISTORY,))
            return Seen(self._named(observation), states[-1])
        picture = read_picture(find(message, adapter.image), "/".join(adapter.image))
        state = self._state(message)
        history = self._state_history(message) if self._needs_states(message) else None
        if history is not None:
            self._check_last(message, None, history[-1])
        pictures, states = (), ()
        begins = self._begins(prompt, picture, state)
        if not begins:
            pictures, states, _ = self._episode
        # Copies, because a view would keep its whole message in memory.
        pictures = (*pictures, picture.copy())[-spec.observed_frames :]
        states = (*states, state.copy())[-spec.proprio_horizon :]
        observation = self._observation(
            _padded(pictures, spec.observed_frames),
            _padded(states, spec.proprio_horizon) if history is None else history,
            prompt,
        )
        self._note_unread(message, adapter.image)
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

    def _named(self, observation: Observation) -> Observation:
        if self._names is None:
            self._names = zip(itertools.repeat(f"session {next(self._numbers)}"), itertools.count())
        return replace(observation, noise_key=next(self._names))

    def _observation(self, pictures: np.ndarray, states: np.ndarray, prompt: str) -> Observation:
        adapter = self._adapter
        try:
            proprio = adapter.proprio(states)
        except ValueError as error:  # such as numbers that are no rotation
            raise RequestError(f"The state is not valid: {error}") from error
        if not np.isfinite(proprio).all():
            raise RequestError("The state has numbers that are too large.")
        if (known := self._spec.proprio) is not None:
            self._note_still(pictures[-1], proprio[-1], known)
            if clipped := known.clips(proprio):
                self.notices.add("state_clipped")
            # Two kinds: a slight excess, which is common, must not hide other units.
            for kind, margin in (("state_far_outside", 3.0), ("state_outside", 0.05)):
                if what := known.beyond(proprio, margin):
                    end = " They are clipped." if clipped else ""
                    self.notices.add(kind, _STATE[kind].format(what) + end)
                    break
        if self._view is not None:
            pictures = self._view(pictures, self.notices)
        return Observation(pictures, proprio, adapter.prompt(prompt))

    def _note_still(self, picture: np.ndarray, state: np.ndarray, known: Ranges) -> None:
        if self._still is None or not np.array_equal(picture, self._still[0]):
            self._still = picture.copy(), state
        elif known.differ(state, self._still[1]):
            self.notices.add(
                "picture_still",
                "The picture has not changed while the robot moved: has the camera stopped?",
            )

    def _check_last(
        self, message: Mapping[str, Any], picture: np.ndarray | None, state: np.ndarray
    ) -> None:
        """Refuses a picture or state beside a history that ends with another one."""
        adapter = self._adapter
        if picture is not None and _has(message, adapter.image):
            name = "/".join(adapter.image)
            if not np.array_equal(read_picture(find(message, adapter.image), name), picture):
                raise RequestError(
                    f"{name!r} is not the last picture of {IMAGE_HISTORY!r}: send only one of them."
                )
        if STATE_HISTORY in message and _has(message, adapter.state[:1]):
            if not np.array_equal(self._state(message), state):
                raise RequestError(
                    f"{adapter.state[0]!r} is not the last state of {STATE_HISTORY!r}: send only "
                    "one of them."
                )

    def _note_unread(self, message: Mapping[str, Any], read: Sequence[str]) -> None:
        unread = unread_pictures(message, read)
        unread = [name for name in unread if name != "/".join(self._adapter.image)]
        if unread:
            camera = f" {self._spec.camera!r}" if self._spec.camera else ""
            self.notices.add(
                "pictures_unread",
                f"{', '.join(map(repr, unread))} is not read: this policy was trained on one camera"
                f"{camera} and sees {'/'.join(read)!r}.",
            )

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

    def _begins(self, prompt: str, picture: np.ndarray, state: np.ndarray) -> bool:
        pictures, states, before = self._episode
        if not pictures or prompt != before or picture.shape != pictures[-1].shape:
            return True
        moved = np.linalg.norm(state[:3] - states[-1][:3])
        return self._adapter.jump is not None and bool(moved > self._adapter.jump)


_STATE = {
    "state_outside": "The state is outside the training data in {}.",
    "state_far_outside": (
        "The state is far outside the training data in {}; are its units those of training?"
    ),
}
_ACTIONS_OUTSIDE = "The policy's actions are far outside the training data in {}."


def _has(message: Mapping[str, Any], keys: Sequence[str]) -> bool:
    value: Any = message
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return True


def _padded(newest: tuple[np.ndarray, ...], count: int) -> np.ndarray:
    """[count, ...] with the oldest one repeated in front."""
    return np.stack([newest[0]] * (count - len(newest)) + list(newest))


def find(message: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Returns the value under nested keys."""
    value: Any = message
    for depth, key in enumerate(keys):
        if not isinstance(value, Mapping) or key not in value:
            raise RequestError(
                f"The observation has no {'/'.join(keys[: depth + 1])!r}; it has "
                f"{_names(value)}. Does the server's --client fit this client?"
            )
        value = value[key]
    return value


def read_picture(value: Any, name: str) -> np.ndarray:
    """Returns a picture, uint8 [h, w, 3] or [3, h, w], as [h, w, 3]."""
    _check_pictures(value, name, 3)
    return value if value.shape[-1] == 3 else np.ascontiguousarray(value.transpose(1, 2, 0))


def read_pictures(value: Any, name: str, count: int) -> np.ndarray:
    """Checks pictures, uint8 [count, h, w, 3]."""
    _check_pictures(value, name, 4)
    if len(value) != count or value.shape[-1] != 3:
        raise RequestError(
            f"{name!r} has shape {list(value.shape)}; this policy takes [{count}, h, w, 3], "
            "oldest first."
        )
    return value


def _check_pictures(value: Any, name: str, axes: int) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        raise RequestError(f"{name!r} must be a uint8 array (0 to 255), not {_kind(value)}.")
    if value.ndim != axes or 3 not in (value.shape[-1], value.shape[-3]):
        wanted = "[h, w, 3]" if axes == 3 else "[t, h, w, 3]"
        raise RequestError(f"{name!r} has shape {list(value.shape)}; expected {wanted}.")
    sides = value.shape[-3:-1] if value.shape[-1] == 3 else value.shape[-2:]
    if min(sides) < 1 or max(sides) > MAX_SIDE:
        raise RequestError(
            f"{name!r} is {sides[0]}x{sides[1]} pixels; expected sides of 1 to {MAX_SIDE}."
        )


def read_numbers(value: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array, number or list of numbers of the given shape as finite float32."""
    if isinstance(value, list | int | float) and not isinstance(value, bool):
        try:
            value = np.asarray(value, np.float64)
        except (ValueError, TypeError, OverflowError):
            raise RequestError(f"{name!r} is not a list of numbers.") from None
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind not in "iuf":
        raise RequestError(f"{name!r} must be an array of numbers, not {_kind(value)}.")
    if value.shape != shape:
        raise RequestError(f"{name!r} has shape {list(value.shape)}; expected {list(shape)}.")
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise RequestError(f"{name!r} has numbers that are NaN, infinite or beyond float32.")
    return value


def read_prompt(message: Mapping[str, Any], default: str) -> str:
    """Returns the instruction of a message, or the default."""
    prompt = message.get("prompt", default)
    if not isinstance(prompt, str):
        raise RequestError(f"'prompt' must be a string, not {_kind(prompt)}.")
    if not prompt:
        raise RequestError("The observation has no 'prompt', and the server has no --prompt.")
    if not any(unicodedata.category(character)[0] in "LNPS" for character in prompt):
        raise RequestError(f"'prompt' has no visible character: {prompt[:20]!r}.")
    if len(prompt) > MAX_PROMPT:
        raise RequestError(f"'prompt' has {len(prompt)} characters; at most {MAX_PROMPT} are read.")
    return prompt


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype} of shape {list(value.shape)}"
    return type(value).__name__


def _names(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"a {_kind(value)}"
    names = [str(name)[:40] for name in list(value)[:8]]
    return ", ".join(map(repr, names)) or "nothing"
