"""A connection's episode: what it has shown so far, as the observations a policy takes."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mvjax.policy.adapters.adapter import Adapter
from mvjax.policy.observation import Observation
from mvjax.policy.request import (
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


class Session:
    """Builds one connection's observations.

    A message with `observation/image_history` holds all pictures itself and leaves no trace here.
    One with a single picture adds it to the pictures of the episode's earlier messages, the first
    one repeated where there are fewer than the policy takes, as in training: their rate is that of
    the messages. A new prompt, `"reset": True` or a robot that has jumped begin a new episode.
    """

    def __init__(self, adapter: Adapter, senses: Senses) -> None:
        self._adapter, self._senses = adapter, senses
        self._pictures: deque[np.ndarray] = deque(maxlen=senses.observed_frames)
        self._states: deque[np.ndarray] = deque(maxlen=senses.proprio_horizon)
        self._prompt: str | None = None

    def reset(self) -> None:
        """Begins a new episode."""
        self._pictures.clear()
        self._states.clear()

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
        else:
            picture = read_picture(
                find(message, adapter.image), "/".join(adapter.image), senses.limits
            )
            state = self._state(message)
            if self._begins(prompt, picture, state):
                self.reset()
            self._prompt = prompt
            pictures = _shift(self._pictures, picture)
            states = _shift(self._states, state)
        observation = Observation(pictures, adapter.proprio(states), adapter.prompt(prompt))
        return Seen(observation, states[-1])

    def actions(self, chunk: np.ndarray, seen: Seen) -> np.ndarray:
        """The policy's chunk in the client's layout, float32 [horizon, any].

        Raises:
            RequestError: the policy answered with NaN or infinity.
        """
        actions = self._adapter.actions(chunk, seen.state)
        if not np.isfinite(actions).all():
            raise RequestError(
                "The policy answered with NaN or infinity; is the state in the units of training?"
            )
        return actions

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
        if not self._pictures:
            return False
        if prompt != self._prompt or picture.shape != self._pictures[-1].shape:
            return True
        moved = np.linalg.norm(state[:3] - self._states[-1][:3])
        return self._adapter.jump is not None and bool(moved > self._adapter.jump)


def _shift(kept: deque, newest: np.ndarray) -> np.ndarray:
    """Adds the newest, and stacks all with the oldest repeated in front."""
    kept.append(newest.copy())  # a view would keep the whole message in memory
    missing = kept.maxlen - len(kept)
    return np.stack([kept[0]] * missing + list(kept))
