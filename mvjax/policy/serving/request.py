"""Reading an observation out of a client's message, and saying what is wrong with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype} of shape {list(value.shape)}"
    return type(value).__name__


def _names(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"a {_kind(value)} there"
    names = [str(name)[:40] for name in list(value)[:8]]
    return ", ".join(map(repr, names)) or "nothing"
