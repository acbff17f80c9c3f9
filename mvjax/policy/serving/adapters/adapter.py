"""What the server must know about a kind of client: where it puts things, and in which units."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def unchanged(values: np.ndarray, *_: np.ndarray) -> np.ndarray:
    """The numbers as they are."""
    return values


@dataclass(frozen=True)
class Adapter:
    """How one kind of client words its observations and wants its actions.

    Attributes:
        name: as given to `--client`.
        image: keys from the message to the picture, uint8 [h, w, 3] or [3, h, w].
        state: keys whose numbers, one after the other, are the robot's state.
        state_size: how many these are.
        proprio: states [h, state_size] as the policy's proprioception [h, proprio_dim].
        actions: the policy's chunk [horizon, action_dim], and the state [state_size] it starts
            from, as the client's actions [horizon, any].
        prompt: the instruction as the policy was trained to read it.
        jump: a robot whose first three numbers (metres) move farther than this between two
            messages has begun a new episode; None where messages must say so.
    """

    name: str
    image: tuple[str, ...]
    state: tuple[str, ...]
    state_size: int
    proprio: Callable[[np.ndarray], np.ndarray] = unchanged
    actions: Callable[[np.ndarray, np.ndarray], np.ndarray] = unchanged
    prompt: Callable[[str], str] = str
    jump: float | None = None


def check_sizes(client: str, *, state: tuple[int, int], action: tuple[int, int]) -> None:
    """Checks that a policy speaks the numbers of a client.

    Args:
        client: its name.
        state, action: how many numbers the client has, and how many the policy.

    Raises:
        ValueError: they differ.
    """
    for what, (clients, policys) in {"state": state, "action": action}.items():
        if clients != policys:
            raise ValueError(
                f"--client={client} has {clients} numbers of {what}, but this policy was trained "
                f"with {policys}: choose the --client that fits it, or plain."
            )
