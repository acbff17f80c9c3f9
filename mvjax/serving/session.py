"""A connection's episode: what it has shown so far, as the observations that a policy takes.

`Session` keeps the episode; the functions below it read a client's message and say what is wrong
with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mvjax.policy.observation import Observation
from mvjax.serving.adapters import Adapter

IMAGE_HISTORY, STATE_HISTORY = "observation/image_history", "observation/state_history"


class RequestError(ValueError):
    """A message that cannot be answered; one sentence for the person who sent it."""


@dataclass(frozen=True)
class RequestLimits:
    """What an observation may be.

    Attributes:
        side: height and width of a picture, pixels.
        prompt: letters of an instruction.
    """

    side: int = 2048
    prompt: int = 1000


@dataclass(frozen=True)
class SessionSpec:
    """What a policy takes in.

    Attributes:
        observed_frames: pictures per observation.
        proprio_horizon: proprioceptive states per observation.
        prompt: the instruction of clients that send none; "" if they must.
        limits: of pictures and prompts.
    """

    observed_frames: int
    proprio_horizon: int
    prompt: str = ""
    limits: RequestLimits = field(default_factory=RequestLimits)


class Seen(NamedTuple):
    """An observation, and the present state in the client's own numbers [state_size]."""

    observation: Observation
    state: np.ndarray


class _Episode(NamedTuple):
    """The newest pictures and states of single-picture messages, and their instruction."""

    pictures: tuple[np.ndarray, ...]
    states: tuple[np.ndarray, ...]
    prompt: str | None


class Session:
    """Builds one connection's observations.

    A message with `observation/image_history` holds all pictures itself and leaves no trace here.
    One with a single picture adds it to the pictures of the episode's earlier messages, the first
    one repeated where there are fewer than the policy takes, as in training: their rate is that of
    the messages. A new prompt, `"reset": True` or a robot that has jumped begin a new episode.
    """

    def __init__(self, adapter: Adapter, senses: SessionSpec) -> None:
        self._adapter, self._senses = adapter, senses
        self.reset()

    def reset(self) -> None:
        """Begins a new episode."""
        self._episode = _Episode((), (), None)

    def observe(self, message: Mapping[str, Any]) -> Seen:
        """What a message shows; a refused message leaves the episode as it was.

        Raises:
            RequestError: something is missing, of a wrong shape or type, too large, or not finite.
        """
        adapter, senses = self._adapter, self._senses
        prompt = read_prompt(message, senses.prompt, senses.limits)
        if IMAGE_HISTORY in message:
            pictures = read_pictures(
                message[IMAGE_HISTORY], IMAGE_HISTORY, senses.observed_frames, senses.limits
            )
            states = self._state_history(message)
            return Seen(self._observation(pictures, states, prompt), states[-1])
        picture = read_picture(find(message, adapter.image), "/".join(adapter.image), senses.limits)
        state = self._state(message)
        pictures, states = (), ()
        if not self._begins(prompt, picture, state):
            pictures, states, _ = self._episode
        # Copies, because a view would keep its whole message in memory.
        pictures = (*pictures, picture.copy())[-senses.observed_frames :]
        states = (*states, state.copy())[-senses.proprio_horizon :]
        observation = self._observation(
            _padded(pictures, senses.observed_frames),
            _padded(states, senses.proprio_horizon),
            prompt,
        )
        self._episode = _Episode(pictures, states, prompt)
        return Seen(observation, state)

    def actions(self, chunk: np.ndarray, seen: Seen) -> np.ndarray:
        """The policy's chunk in the client's layout, float32 [horizon, any].

        Raises:
            RequestError: the policy answered with NaN or infinity.
        """
        if np.isfinite(chunk).all():
            actions = self._adapter.actions(chunk, seen.state)
            if np.isfinite(actions).all():
                return actions
        raise RequestError(
            "The policy answered with NaN or infinity; is the state in the units of training?"
        )

    def _observation(self, pictures: np.ndarray, states: np.ndarray, prompt: str) -> Observation:
        adapter = self._adapter
        try:
            proprio = adapter.proprio(states)
        except ValueError as error:  # numbers that are no rotation, for example
            raise RequestError(f"The state makes no sense: {error}.") from error
        if not np.isfinite(proprio).all():
            raise RequestError("The state has numbers beyond all use.")
        return Observation(pictures, proprio, adapter.prompt(prompt))

    def _state(self, message: Mapping[str, Any]) -> np.ndarray:
        """[state_size] out of one key or several; a lone number is a vector of one."""
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
        """[proprio_horizon, state_size]; one state will do where the policy takes one."""
        horizon = self._senses.proprio_horizon
        if STATE_HISTORY not in message and horizon == 1:
            return self._state(message)[None]
        value = find(message, [STATE_HISTORY])
        return read_numbers(value, STATE_HISTORY, (horizon, self._adapter.state_size))

    def _begins(self, prompt: str, picture: np.ndarray, state: np.ndarray) -> bool:
        pictures, states, before = self._episode
        if not pictures or prompt != before or picture.shape != pictures[-1].shape:
            return True
        moved = np.linalg.norm(state[:3] - states[-1][:3])
        return self._adapter.jump is not None and bool(moved > self._adapter.jump)


def _padded(newest: tuple[np.ndarray, ...], count: int) -> np.ndarray:
    """[count, ...] with the oldest repeated in front."""
    return np.stack([newest[0]] * (count - len(newest)) + list(newest))


def find(message: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value under nested keys.

    Raises:
        RequestError: there is none.
    """
    value: Any = message
    for depth, key in enumerate(keys):
        if not isinstance(value, Mapping) or key not in value:
            raise RequestError(
                f"The observation has no {'/'.join(keys[: depth + 1])!r}; it has "
                f"{_names(value)}. Is the server's --client the kind of this client?"
            )
        value = value[key]
    return value


def read_picture(value: Any, name: str, limits: RequestLimits) -> np.ndarray:
    """uint8 [h, w, 3] from [h, w, 3] or [3, h, w].

    Raises:
        RequestError: it is no such picture, or too large.
    """
    _check_pictures(value, name, 3, limits)
    return value if value.shape[-1] == 3 else np.ascontiguousarray(value.transpose(1, 2, 0))


def read_pictures(value: Any, name: str, count: int, limits: RequestLimits) -> np.ndarray:
    """uint8 [count, h, w, 3], oldest first.

    Raises:
        RequestError: it is not, or too large.
    """
    _check_pictures(value, name, 4, limits)
    if len(value) != count or value.shape[-1] != 3:
        raise RequestError(
            f"{name!r} has shape {list(value.shape)}; this policy takes [{count}, h, w, 3], "
            "oldest first."
        )
    return value


def _check_pictures(value: Any, name: str, axes: int, limits: RequestLimits) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        raise RequestError(f"{name!r} must be a uint8 array (0 to 255), not {_kind(value)}.")
    if value.ndim != axes or 3 not in (value.shape[-1], value.shape[-3]):
        wanted = "[h, w, 3]" if axes == 3 else "[t, h, w, 3]"
        raise RequestError(f"{name!r} has shape {list(value.shape)}; expected {wanted}.")
    sides = value.shape[-3:-1] if value.shape[-1] == 3 else value.shape[-2:]
    if min(sides) < 1 or max(sides) > limits.side:
        raise RequestError(
            f"{name!r} is {sides[0]}x{sides[1]} pixels; sides of 1 to {limits.side} are taken."
        )


def read_numbers(value: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of the given shape, from an array, a number or a list of numbers.

    Raises:
        RequestError: it has another shape, is not of real numbers, or not finite.
    """
    if isinstance(value, list | int | float) and not isinstance(value, bool):
        try:
            value = np.asarray(value, np.float64)
        except (ValueError, TypeError, OverflowError):
            raise RequestError(f"{name!r} is a list of other things than numbers.") from None
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind not in "iuf":
        raise RequestError(f"{name!r} must be an array of numbers, not {_kind(value)}.")
    if value.shape != shape:
        raise RequestError(f"{name!r} has shape {list(value.shape)}; expected {list(shape)}.")
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise RequestError(f"{name!r} has numbers that are NaN, infinite or beyond float32.")
    return value


def read_prompt(message: Mapping[str, Any], default: str, limits: RequestLimits) -> str:
    """The instruction.

    Raises:
        RequestError: there is none, it is no text, or too long.
    """
    prompt = message.get("prompt", default)
    if not isinstance(prompt, str):
        raise RequestError(f"'prompt' must be a text, not {_kind(prompt)}.")
    if not prompt.strip():
        raise RequestError("The observation has no 'prompt', and the server has no --prompt.")
    if len(prompt) > limits.prompt:
        raise RequestError(
            f"'prompt' has {len(prompt)} letters; at most {limits.prompt} are taken."
        )
    return prompt


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype} of shape {list(value.shape)}"
    return type(value).__name__


def _names(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"a {_kind(value)} there"
    names = [str(name)[:40] for name in list(value)[:8]]
    return ", ".join(map(repr, names)) or "nothing"
