"""The parts of a client's message: read and checked, or refused with a sentence."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MAX_SIDE = 2048  # height and width of a picture, pixels
MAX_PROMPT = 1000  # characters


class RequestError(ValueError):
    """A message that cannot be answered; its text is sent to the client."""


def has(message: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """Returns whether there is a value under nested keys."""
    value: Any = message
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return True


def find(message: Mapping[str, Any], keys: Sequence[str], camera: str = "") -> Any:
    """Returns the value under nested keys; `camera`: whose pictures these are, of several."""
    value: Any = message
    for depth, key in enumerate(keys):
        if not isinstance(value, Mapping) or key not in value:
            if camera:
                raise RequestError(
                    f"The observation has no {'/'.join(keys)!r}, where the pictures of the camera "
                    f"{camera!r} are expected; it has {_names(value)}. Send either one picture or "
                    "the history of every camera."
                )
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
