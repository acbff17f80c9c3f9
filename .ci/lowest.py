"""Prints the lowest version of every package that pyproject.toml asks for: constraints for pip.

python3.11 .ci/lowest.py dev wandb >lowest.txt    # the base's packages and those of these extras
pip install -c lowest.txt -e ".[dev,wandb]"
"""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,]+)\])?(.*)")
_LOWEST = re.compile(r"(?:>=|==)([\w.]+)")


def requirements(project: dict, extras: list[str]) -> dict[str, str]:
    """Package -> its lowest version, of the base and of extras with the extras that they name."""
    found, left, known = {}, list(extras), project["optional-dependencies"]
    listed = list(project["dependencies"])
    while left:
        for text in known[left.pop()]:
            name, inside, _ = _REQUIREMENT.fullmatch(text).groups()
            if name == project["name"]:
                left += inside.split(",")
            else:
                listed.append(text)
    for text in listed:
        name, _, versions = _REQUIREMENT.fullmatch(text).groups()
        bound = _LOWEST.search(versions)
        if bound is None:
            raise ValueError(f"{text} has no lower bound")
        # Of two bounds, such as numpy's in the base and in [train], the higher one holds.
        found[name] = max(found.get(name, "0"), bound[1], key=_numbers)
    return found


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


if __name__ == "__main__":
    found = requirements(tomllib.loads(PYPROJECT.read_text())["project"], sys.argv[1:])
    print("\n".join(f"{name}=={version}" for name, version in found.items()))
