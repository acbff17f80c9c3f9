"""What a robomimic HDF5 file says in words: JSON attributes, and the instruction."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

STYLES = ("stored", "release")  # as the file has it; the wording mimic-video was trained with
_SCENE = re.compile(r"^[A-Z_]+_SCENE\d+_")


@dataclass(frozen=True)
class Wording:
    """How a demonstration gets its instruction.

    Attributes:
        fixed: one for all, if given.
        style: of `STYLES`.
    """

    fixed: str | None
    style: str

    def of(self, data: h5py.Group, demo: h5py.Group, file: Path) -> str:
        """The instruction; "" where there is none.

        Args:
            data: the file's group `data`.
            demo: the demonstration's.
            file: for its name.

        Raises:
            ValueError: if it is not readable text.
        """
        text = self._text(data, demo, file)
        if not text.isprintable():  # also how h5py marks bytes that are not UTF-8
            raise ValueError(f"{file}: the instruction {text!r} has characters that are no text")
        return text

    def _text(self, data: h5py.Group, demo: h5py.Group, file: Path) -> str:
        if self.fixed is not None:
            return self.fixed
        if self.style == "release":
            words = file.stem.removesuffix("_demo").replace("_", " ")
            return words.replace("black bowl", "bowl") + "."
        stored = json_attribute(data, "problem_info").get("language_instruction")
        stored = stored or json_attribute(demo, "ep_meta").get("lang")  # LIBERO's, RoboCasa's
        if stored and isinstance(stored, str | list):
            # Some of LIBERO's are lists of characters, some are quoted.
            return "".join(map(str, stored)).strip().strip('"')
        if not file.stem.endswith("_demo"):
            return ""
        return _SCENE.sub("", file.stem.removesuffix("_demo")).replace("_", " ")


def json_attribute(group: h5py.Group, key: str) -> dict[str, Any]:
    """A JSON attribute; empty where it is missing or something else."""
    text = string(group.attrs.get(key, "{}"))
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def string(value: Any) -> str:
    """An attribute or entry that is text, however it was stored."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
