"""Comparing the settings something was made with against those of a run that reads it."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def differences(there: Any, here: Any, name: str) -> list[str]:
    """What disagrees below the setting `name`, e.g. ["clip.height is 64 there, 32 here"].

    Args:
        there: a configuration value as stored (JSON, so tuples have become lists).
        here: the same value of this run.
        name: its dotted name.
    """
    there, here = _plain(there), _plain(here)
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = sorted({*there, *here})
        return [d for k in keys for d in differences(there.get(k), here.get(k), f"{name}.{k}")]
    return [] if there == here else [f"{name} is {there} there, {here} here"]


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value
