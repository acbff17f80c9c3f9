"""A connection's episode: what it has shown so far, as the observations a policy takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mvjax.policy.observation import Observation
from mvjax.policy.serving.adapters.adapter import Adapter
from mvjax.policy.serving.request import (
    IMAGE_HISTORY,
    STATE_HISTORY,
    RequestError,
    RequestLimits,
    find,
    read_numbers,
    read_picture,
    read_pictures,
    read_prompt,
)


@dataclass(frozen=True)
class Senses:
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

    def __init__(self, adapter: Adapter, senses: Senses) -> None:
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
