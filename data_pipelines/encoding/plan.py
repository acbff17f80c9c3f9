"""What an encoding job is asked to do, kept beside its records, so that no two are mixed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from data_pipelines.encoding.shared_folder import wait_until
from data_pipelines.records.writer import write_json

_TRAINING_ONLY = ("mask_padding",)  # settings of policy_io that decide nothing here


def plain(value: Any) -> Any:
    """A setting as JSON has it: dicts, lists, numbers, text."""
    if isinstance(value, ConfigDict | Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def encoding_settings(
    dataset: ConfigDict,
    clip: ConfigDict,
    policy_io: ConfigDict,
    identity: Mapping[str, str],
    **rest: Any,
) -> dict[str, Any]:
    """Everything that decides what is in the records; the arguments of `encode_dataset`."""
    names = ("name", "video", "action", "proprio", "embodiment")
    windows = policy_io if dataset.action or dataset.proprio else {}
    settings = {
        "dataset": {name: dataset[name] for name in names if name in dataset},
        "clip": clip,
        "policy_io": recorded_policy_io(windows),
        "identity": identity,
    }
    return plain(settings | rest)


def recorded_policy_io(policy_io: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The windows of actions and proprioception without what only training reads."""
    return {
        name: {key: value for key, value in window.items() if key not in _TRAINING_ONLY}
        for name, window in plain(policy_io).items()
    }


def begin(path: Path, settings: dict[str, Any], process: int) -> None:
    """Writes the plan, or compares it with the one that is there.

    Raises:
        ValueError: if the folder has records that were made with other settings.
    """
    plan = path / "plan.json"
    # A plan of which nothing was made, because of a mistake in it, binds nobody.
    if process == 0 and not any(path.glob("shard_*.npz")):
        path.mkdir(parents=True, exist_ok=True)
        write_json(plan, settings)
    wait_until(plan.exists)
    found = json.loads(plan.read_text())
    if found == settings:
        return
    keys = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    changed = [f"{key}: {found.get(key)} there, {settings.get(key)} now" for key in keys]
    advice = "Choose another folder, or delete this one to encode again"
    if keys == ["identity"] and _same_tokenizer(found["identity"], settings["identity"]):
        advice += "; --only=text changes the text embeddings alone"
    raise ValueError(f"{path} was begun with other settings ({'; '.join(changed)}). {advice}.")


def _same_tokenizer(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    return a.get("tokenizer") == b.get("tokenizer")
