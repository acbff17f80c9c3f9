"""docs/troubleshooting.md quotes messages as the code says them.

A quoted message is a ```text block without a title, or several words in `code`. "…" stands for what
differs; every fragment between must be found in a string of the sources.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
COMMANDS = ("bash", "curl", "git", "mvjax", "pip", "python", "unset")
MESSAGE_WORDS = 4  # fewer in `code` are a setting, a path or a value


def quoted() -> list[str]:
    """Every message that the page quotes, in its order."""
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    spans = [
        span
        for span in re.findall(r"`([^`]+)`", prose)
        if len(span.split()) >= MESSAGE_WORDS
        and not span.startswith(COMMANDS)
        and "=" not in span.split()[0]  # a variable before a command
    ]
    return [" ".join(message.split()) for message in blocks + spans]


@cache
def said() -> str:
    """All strings of the sources, a line each: literals of Python, text of shell scripts."""
    lines = []
    for folder in ("mvjax", "data_pipelines", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    lines.append(" ".join(node.value.split()))
    # A message in bash may be of several words on several lines: "..." \
    shell = (path.read_text() for path in (ROOT / "launch").glob("*.sh"))
    lines += [re.sub(r'" \\\n\s*"', " ", text) for text in shell]
    return "\n".join(lines)


def fragments(message: str) -> list[str]:
    """The parts of a message that do not differ, without the ends that a format may have."""
    return [part.strip() for part in message.split("…") if re.search(r"\w{2}", part)]


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_in_the_code(message):
    missing = [part for part in fragments(message) if part not in said()]
    assert not missing, f"no message of the code has {missing}"


def test_the_page_quotes_enough_to_be_worth_searching():
    messages = quoted()
    assert len(messages) > 50 and all(map(fragments, messages))
