"""Reads the flags of commands as the commands do, without running them.

    python -m parse_flags MODULE CALLS.json ANSWERS.json

CALLS.json is a list of [arguments, whether a person types them as they are]; ANSWERS.json has one
sentence for each, "" where nothing is wrong. The module runs once; every command line is then read
in a process forked from this one, because flags and configurations remember what they were given.
"""

import contextlib
import importlib.util
import io
import json
import os
import runpy
import sys
from pathlib import Path

from launch import entry
from mvjax.training import directory

_OPEN = "--config=quickstart_action:smoke"  # any would do: all have the same settings
_PLACEHOLDERS = ("...", "…", "FILE.py", "CONFIG")


def main(module: str, calls: str, answers: str) -> None:
    """Answers every command line of CALLS.json."""
    positional: list[tuple[str, ...]] = []
    source = Path(importlib.util.find_spec(module).origin).read_text()
    if "from launch.entry import" not in source:  # it has no flags, or reads them by itself
        said = ["" for _ in _read(calls)]
    else:
        entry.run = lambda main, given=(), **named: positional.append(
            named.get("positional", given)
        )
        sys.argv = [module]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        said = [_in_a_fork(module, *call, positional[0]) for call in _read(calls)]
    Path(answers).write_text(json.dumps(said))


def _read(path: str) -> list[tuple[list[str], bool]]:
    return json.loads(Path(path).read_text())


def _in_a_fork(module: str, words: list[str], complete: bool, positional: tuple[str, ...]) -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        said = io.StringIO()
        code = 1
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = _parse(module, words, complete, positional)
            except SystemExit as end:
                code = end.code
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=said)
        lines = said.getvalue().strip().splitlines() or ["ended with an error"]
        os.write(writer, (lines[-1].removeprefix("parse_flags: ") if code else "").encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        sentence = pipe.read()
    os.waitpid(child, 0)
    return sentence


def _parse(module: str, words: list[str], complete: bool, positional: tuple[str, ...]) -> int:
    directory.read_meta = _meta  # configs/trained.py takes it from there
    own = [_with_a_configuration(word) for word in words]
    if not complete and not any(word.startswith(("--config=", "--checkpoint")) for word in own):
        own = [_OPEN, *own] if any(word.startswith("--config.") for word in own) else own
    sys.argv = [module, *own]
    given = entry._parse([module, *own])[1:]
    if "--" not in words:  # `launch.local` has the rest for another command
        several = positional and positional[-1].endswith("...")
        if len(given) < len(positional):
            print(f"{positional[len(given)]} must be given", file=sys.stderr)
            return 2
        if len(given) > len(positional) and not several:
            print(f"unexpected argument {given[len(positional)]!r}", file=sys.stderr)
            return 2
    return 0


def _with_a_configuration(word: str) -> str:
    """A configuration that is left open has the settings that all have."""
    name, _, value = word.partition("=")
    left_open = name == "--config" and value.startswith(_PLACEHOLDERS)
    return _OPEN if left_open else word


def _meta(directory: Path, step: int | None = None) -> dict:
    """What a training directory knows: a page's runs are not there when its flags are read."""
    from configs import quickstart_action, quickstart_video

    del step
    stage = quickstart_video if Path(directory).name.startswith("video") else quickstart_action
    config = stage.get_config("smoke").copy_and_resolve_references()
    return {"config": json.loads(config.to_json())}


if __name__ == "__main__":
    main(*sys.argv[1:])
