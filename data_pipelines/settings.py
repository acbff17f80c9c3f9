"""Settings as JSON values, and the differences between two sets of settings."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def plain(value: Any) -> Any:
    """A configuration value in JSON types: dicts, lists, numbers, text."""
    if isinstance(value, ConfigDict | Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


_NOTHING = (None, {})
# What earlier versions did, whose settings lack these names.
ABSENT = {
    "attention_to": "all",
    "context_frames": "all",
    "prefix": 0,
    "prefix_share": 0.5,
    "chunking": "none",
}


def differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Lists differences between stored settings ("there") and those of this run ("here").

    Each is one sentence, such as "clip.height is 64 there, 32 here", with names below `prefix`. A
    missing setting counts as None, or as what it was before it could be set; a missing section
    counts as an empty one, and a tuple equals a list, as in JSON.
    """
    before, after = plain(before), plain(after)
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            sentence
            for key in sorted({*before, *after})
            for sentence in differences(
                before.get(key, ABSENT.get(key)),
                after.get(key, ABSENT.get(key)),
                f"{prefix}.{key}" if prefix else key,
            )
        ]
    same = before == after or (before in _NOTHING and after in _NOTHING)
    return [] if same else [f"{prefix} is {before!r} there, {after!r} here"]


def other_networks(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Lists differences between two identities of tokenizer and text encoder, as `differences`.

    Identities of earlier versions lack the last words, the digests of all weights and of the
    vocabulary: they are compared by the words that they have.
    """
    after = dict(after)
    for name in before.keys() & after.keys():
        words = before[name].split(), after[name].split()
        shared = min(map(len, words))
        if words[0][:shared] == words[1][:shared]:
            after[name] = before[name]
    return differences(before, after, "identity")
