"""BridgeData V2's crowd-sourced instructions, as stored and as mimic-video trained on them.

About 13 % of the trajectories have none. Of the others the release repairs some and drops 3,046
that say nothing about the task. It cannot find those that describe something else than what is
seen, and leaves other languages in.
"""

import re

_COMPLAINTS = (
    *("no image", "did not load", "not loaded", "not downloading", "images loaded"),
    *("pictures aren't working", "not showing"),
)
_MARKS = frozenset('"_^~@#$%*+=|?ëěẽēėęćčċ')  # of mistyped or wrongly decoded labels
_SHOUTED = re.compile(r"(?<![A-Za-z])[A-Z]{2,}(?![A-Za-z])")
# Four consonants, digits or dots in a row are a hand on the keyboard, unless they are spelling.
_SPELT = "|".join("gh ng th ch sh ph wh ck qu bb cc dd ff gg ll mm nn pp rr ss tt zz".split())
_MASHED = re.compile(rf"(?:(?!{_SPELT})[bcdfghjklmnpqrstvwxz0-9.]){{4}}", re.IGNORECASE)
_FENCE, _REMARK = " cardboard fence", " (does not mention the locations of the objects)"
_REPAIRS = {
    "4fbox": " cardboard box",
    "1fbox": " cardboard box",
    "clockwise90": "clockwise 90 degrees",
    "bpttle": "bottle",
    "thng": "thing",
    "upawrds": "upwards",
}


def stored_label(text: str) -> str:
    """The first line that is an instruction; "" if there is none.

    Args:
        text: of `lang.txt`: instructions, each followed by a line "confidence: <number>".
    """
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line and not line.startswith("confidence:")), "")


def released_label(text: str) -> str:
    """The first line that the release keeps, as it repairs it; "" if it keeps none.

    Args:
        text: of `lang.txt`.
    """
    lines = (line.strip() for line in text.splitlines() if "confidence" not in line)
    return next((kept for line in lines if (kept := _kept(line)) is not None), "")


def _kept(line: str) -> str | None:
    if " " not in line or any(complaint in line for complaint in _COMPLAINTS):
        return None
    line = line.removesuffix(_FENCE).strip().replace(",", ", ").replace(" ,", ",")
    line = re.sub(r"\s+", " ", line)
    if _SHOUTED.search(line):
        line = line.lower()
    line = re.sub("stuffed([a-z]+)", r"stuffed \1", line)
    for wrong, right in _REPAIRS.items():
        line = line.replace(wrong, right)
    if _MASHED.search(line):
        return None
    line = line.removesuffix(_REMARK).removeprefix('"').removesuffix('"')
    return None if _MARKS.intersection(line) else line
