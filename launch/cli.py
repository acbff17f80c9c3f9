"""`mvjax COMMAND [flags]`, which `pip install` puts on the PATH, is `python -m launch.COMMAND`.

This file needs no package but mvjax itself, so that `mvjax --help` works wherever it is installed.
"""

import difflib
import os
import runpy
import sys
from typing import NamedTuple, NoReturn

import mvjax

program = ""  # what the person typed, "mvjax train"; "" where it was `python -m launch.train`


class Command(NamedTuple):
    """One line of `mvjax --help`, and the extra that brings the packages of the command."""

    help: str
    extra: str = "train"


COMMANDS = {
    "quickstart": Command(
        "run everything: data, both training stages, a simulated robot, a report", "sim"
    ),
    "inspect": Command("show what is in a dataset and what is wrong with it"),
    "encode": Command("encode datasets once into records of latents, text and actions"),
    "train": Command("train one stage: the video model or the action decoder"),
    "convert": Command("convert weights between PyTorch files and checkpoints of this project"),
    "generate": Command("generate a video from a picture and a prompt"),
    "evaluate": Command("evaluate a policy in a simulator or on held-out episodes", "sim"),
    "record": Command("record demonstrations in a simulator", "sim"),
    "serve": Command("serve a policy to robots", "serve"),
    "estimate": Command("estimate memory and time of a run on a TPU pod, without a TPU", "tpu"),
    "local": Command("run a command in several processes on this machine"),
}

# Packages that another extra brings than the one the command usually needs.
_EXTRA_OF_PACKAGE = {
    "metaworld": "sim",
    "mujoco": "sim",
    "gymnasium": "sim",
    "torch": "torch",
    "diffusers": "torch",
    "transformers": "torch",
    "peft": "torch",
    "wandb": "wandb",
    "libtpu": "tpu",
}
_OURS = ("mvjax", "data_pipelines", "configs", "launch")


def main() -> None:
    """Runs the command that the first argument names, as `python -m launch.COMMAND` would."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("help", "--help", "-h"):
        print(_usage())
    elif name == "--version":
        print(f"mvjax {mvjax.__version__}")
    elif name in COMMANDS:
        _run(name, arguments)
    else:
        close = difflib.get_close_matches(name, COMMANDS)
        hint = f"did you mean {' or '.join(close)}?" if close else "`mvjax --help` lists them."
        _stop(f"there is no command {name!r}; {hint}")


def _run(name: str, arguments: list[str]) -> None:
    global program
    program = f"mvjax {name}"
    sys.argv = [program, *arguments]
    try:
        # As the main module: flags belong to it, and processes that are spawned import it again.
        runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", *_OURS) or os.environ.get("MVJAX_TRACEBACK"):
            raise
        extra = _EXTRA_OF_PACKAGE.get(package, COMMANDS[name].extra)
        _stop(f"`{program}` needs the package {package}: pip install 'mvjax[{extra}]'.")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: mvjax COMMAND [flags]",
            "",
            *lines,
            "",
            "`mvjax COMMAND --help` shows what a command does and its flags.",
            "`mvjax --version` prints the version.",
        ]
    )


def _stop(sentence: str) -> NoReturn:
    print(f"mvjax: {sentence}", file=sys.stderr)
    raise SystemExit(2)
