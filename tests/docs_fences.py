"""The pages of the documentation as tests read them: fences, and the commands in them.

A fence ```bash or ```python without a title is a promise that it runs: `docs_commands.py` runs it.
One with a title says where it was run. What is typed in either is parsed by `parse_flags.py`.
"""

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from launch.cli import COMMANDS

ROOT = Path(__file__).parents[1]
LANGUAGES = {"bash", "python", "text", "yaml", "json", "toml", "dockerfile"}

_FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<marks>`{3,}|~{3,})(?P<info>[^`]*)$")
_MARKER = re.compile(r"^[ \t]*(?:[-*+]|\d+\.)[ \t]+(?=`{3})")  # of a list, before a fence
_TITLE = re.compile(r'\btitle="([^"]*)"')
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_MODULE = re.compile(r"launch(\.\w+)+")
_SUBSTITUTION = re.compile(r"\$(\{[^}]*\}|\w+|\(\))")
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_INLINE_CALL = re.compile(
    r"(\w+=\S+ )*(mvjax \w|python -m launch|launch\.|launch/|bash launch).* --"
)
# Scripts that pass their flags on to a module.
_SCRIPTS = {
    "launch/quickstart.sh": "launch.quickstart",
    "launch/benchmarks/gpu.sh": "launch.benchmarks.gpu",
    "launch/cluster/slurm.sh": "launch.train",
    "launch/cluster/tpu_vm.sh": "launch.train",
    "launch/cluster/xpk.sh": "launch.train",
    "launch/cluster/pod.sh": "launch.train",
}
_OF_THE_SCRIPT = ("--wheels=",)  # flags of gpu.sh itself


class Fence(NamedTuple):
    """A code block.

    Attributes:
        page: relative to the repository.
        line: of the opening marks, from 1.
        language: the first word after them.
        title: what is said about where it runs; None where nothing is.
        text: without the indentation of the marks.
    """

    page: str
    line: int
    language: str
    title: str | None
    text: str

    @property
    def runs(self) -> bool:
        """Whether the page promises that it runs."""
        return self.language in ("bash", "python") and self.title is None


class Call(NamedTuple):
    """One of our commands as a page has it; `fault` says what is wrong before any flag is read."""

    page: str
    line: int
    module: str
    arguments: tuple[str, ...]
    complete: bool = True  # False for a command in the middle of a sentence
    fault: str = ""


def page_names() -> list[str]:
    """README, CONTRIBUTING and what stands in docs/, but not the reference."""
    names = ["README.md", "CONTRIBUTING.md"]
    return names + sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))


def fences(page: str, text: str) -> list[Fence]:
    """The fences of a page, those in lists, tabs and admonitions too."""
    found, lines, number = [], text.splitlines(), 0
    while number < len(lines):
        start = number
        opening = _FENCE.match(_MARKER.sub(lambda m: " " * len(m[0]), lines[number]))
        number += 1
        if not opening:
            continue
        body = []
        while number < len(lines) and not _closes(lines[number], opening["marks"]):
            body.append(lines[number])
            number += 1
        number += 1
        title = _TITLE.search(opening["info"])
        language = (opening["info"].split() or [""])[0]
        code = textwrap.dedent("\n".join(body)) + "\n"
        found.append(Fence(page, start + 1, language, title and title[1], code))
    return found


def _closes(line: str, marks: str) -> bool:
    word = line.strip()
    return len(word) >= len(marks) and not word.strip(marks[0])


def indented_commands(text: str, page: str) -> Iterator[str]:
    """ "page:line: text" of commands that stand in indented blocks, which nothing checks."""
    inside = {
        number
        for fence in fences(page, text)
        for number in range(fence.line, fence.line + fence.text.count("\n") + 2)
    }
    command = re.compile(
        r"^(?: {4,}|\t+)(?:\w+=\S+ )*(python3?|mvjax|bash|pip|git|docker|gcloud) \S"
    )
    for number, line in enumerate(text.splitlines(), start=1):
        if number not in inside and command.match(line):
            yield f"{page}:{number}: {line.strip()}"


def calls(fence: Fence) -> Iterator[Call]:
    """Our commands in a fence of shell."""
    for number, words in simple_commands(fence.text):
        yield from _calls(fence.page, fence.line + number, words, complete=True)


def inline_calls(page: str, text: str) -> Iterator[Call]:
    """Our commands in sentences and tables; required flags may be left out there."""
    blank = text.splitlines()
    for fence in fences(page, text):  # of equal lines, so that numbers stay
        end = fence.line + fence.text.count("\n") + 1
        blank[fence.line - 1 : end] = [""] * len(blank[fence.line - 1 : end])
    text = "\n".join(blank)
    for span in _INLINE.finditer(text):
        words = " ".join(span[1].split())
        if _INLINE_CALL.match(words):
            line = text.count("\n", 0, span.start()) + 1
            for _, simple in simple_commands(words):
                yield from _calls(page, line, simple, complete=False)


def simple_commands(script: str) -> Iterator[tuple[int, list[str]]]:
    """(line from 1, words) of every simple command, without pipes, redirections and comments."""
    lines, number = script.splitlines(), 0
    while number < len(lines):
        start, logical = number, lines[number]
        number += 1
        while True:
            continued = logical.endswith("\\")
            try:
                tokens = [] if continued else _tokens(logical)
            except ValueError:  # a quotation goes on in the next line
                tokens, continued = [logical], True
            if not continued or number == len(lines):
                break
            logical = (logical[:-1] if logical.endswith("\\") else logical + "\n") + lines[number]
            number += 1
        here = re.search(r"<<-?\s*['\"]?(\w+)", logical)
        if here:
            while number < len(lines) and lines[number].strip() != here[1]:
                number += 1
            number += 1
        words: list[str] = []
        skip = False
        for token in [*tokens, ";"]:
            if token and not token.strip("();<>|&"):
                if "<" in token or ">" in token:
                    skip = True  # the file's name comes next
                    if words and words[-1].isdigit():
                        words.pop()  # 2>file
                    continue
                if words:
                    yield start + 1, words
                words, skip = [], False
            elif skip:
                skip = False
            else:
                words.append(token)


def _tokens(line: str) -> list[str]:
    line = _SUBSTITUTION.sub("1", line)  # what a variable holds is not known; a number often passes
    reader = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    reader.whitespace_split = True
    return list(reader)


def _calls(page: str, line: int, words: list[str], complete: bool) -> Iterator[Call]:
    variables = {}
    while words and _ASSIGNMENT.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    for position, word in enumerate(words):
        rest = words[position + 1 :]
        name = word.removeprefix("./")
        if position == 0 and word == "mvjax":
            yield from _of_program(page, line, rest, complete)
            return
        if word == "mvjax" and rest and rest[0] in COMMANDS:  # after srun, time, docker run IMAGE
            yield from _call(page, line, f"launch.{rest[0]}", rest[1:], complete)
            return
        if _MODULE.fullmatch(word):
            yield from _call(page, line, word, rest, complete)
            return
        if name in _SCRIPTS:
            module = variables.get("MODULE", _SCRIPTS[name])
            own = [w for w in rest if not w.startswith(_OF_THE_SCRIPT)]
            # A cluster's script is told the rest by variables.
            yield from _call(page, line, module, own, complete)
            return
        if position < 2 and re.fullmatch(r"(launch|tests|docs|\.ci)/\S+", name):
            if not (ROOT / name).exists():
                yield Call(page, line, "", (), fault=f"there is no file {name}")
            return
        if " " in word:  # --command="mvjax train ..."
            for _, inner in simple_commands(word):
                yield from _calls(page, line, inner, complete)


def _of_program(page: str, line: int, words: list[str], complete: bool) -> Iterator[Call]:
    if words and words[0] in COMMANDS:
        yield from _call(page, line, f"launch.{words[0]}", words[1:], complete)
    elif words and words[0] not in ("help", "-h", "--help", "--version", "COMMAND"):
        yield Call(page, line, "", (), fault=f"mvjax has no command {words[0]!r}")


def _call(page: str, line: int, module: str, words: list[str], complete: bool) -> Iterator[Call]:
    path = ROOT / module.replace(".", "/")
    if not path.with_suffix(".py").exists() and not path.is_dir():
        yield Call(page, line, "", (), fault=f"there is no module {module}")
        return
    yield Call(page, line, module, tuple(words), complete)
    if module == "launch.local" and "--" in words[:-1]:
        inner, *rest = words[words.index("--") + 1 :]
        inner = f"launch.{inner}" if inner in COMMANDS else inner
        yield from _call(page, line, inner, rest, complete)
