"""Settings as a JSON file holds them, and what two sets of settings disagree in."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def plain(value: Any) -> Any:
    """A configuration value as JSON has it: dicts, lists, numbers, text."""
    if isinstance(value, ConfigDict | Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    """What disagrees, one sentence each: ["clip.height is 64 there, 32 here"].

    Args:
        before: settings as stored ("there").
        after: the same settings of this run ("here"). A setting that is missing counts as None, and
            a tuple equals a list, which is what JSON makes of it.
        prefix: their dotted name, e.g. "clip"; "" for a whole configuration.
    """
    before, after = plain(before), plain(after)
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            sentence
            for key in sorted({*before, *after})
            for sentence in differences(
                before.get(key), after.get(key), f"{prefix}.{key}" if prefix else key
            )
        ]
    return [] if before == after else [f"{prefix} is {before!r} there, {after!r} here"]
