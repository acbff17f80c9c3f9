"""The `mvjax` program, in processes of its own, as a person starts it."""

import subprocess
import sys
from pathlib import Path

import pytest

import mvjax as package
from launch.cli import COMMANDS

LAUNCH = Path(__file__).parents[1] / "launch"
NOT_COMMANDS = {"__init__", "cli", "entry", "phases", "preflight", "robot_loop", "tpu_compiler"}
HIDE = "import sys; sys.modules.update(dict.fromkeys(['absl', 'jax'])); sys.argv[0] = 'mvjax'; "


def mvjax(*arguments: str, before: str = "", **how) -> subprocess.CompletedProcess:
    code = f"{before}from launch.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, **how
    )


@pytest.mark.parametrize("arguments", [(), ("--help",), ("help",)])
def test_help_lists_every_command_and_needs_no_package(arguments):
    result = mvjax(*arguments, before=HIDE)
    assert result.returncode == 0, result.stderr
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


def test_version():
    assert mvjax("--version", before=HIDE).stdout == f"mvjax {package.__version__}\n"


def test_an_unknown_command_is_one_sentence_with_close_matches():
    result = mvjax("trian")
    assert result.returncode == 2 and "did you mean train?" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_package_names_the_extra():
    result = mvjax("train", before=HIDE)
    assert result.returncode == 2 and "pip install 'mvjax[train]'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_mistake_is_said_in_the_name_of_what_was_typed():
    result = mvjax("local", "--processes=none", "--", "train")
    assert result.returncode == 2 and result.stderr.startswith(
        "mvjax local: flag --processes=none:"
    )
    result = mvjax("local", "--processes=1")
    assert result.stderr == "mvjax local: COMMAND... must be given.\n"


def test_local_takes_a_command_and_keeps_its_flags_apart():
    result = mvjax("local", "--processes", "2", "--", "estimate", "--no-such-flag")
    assert result.returncode == 2
    said = result.stderr.splitlines()
    assert said[0].startswith("launch.estimate: Unknown command line flag 'no_such_flag'")
    assert said[-1].startswith("mvjax local: process")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_itself(name):
    result = mvjax(name, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"python -m launch.{name}" in result.stdout


def test_no_command_is_left_out():
    assert {path.stem for path in LAUNCH.glob("*.py")} - NOT_COMMANDS == set(COMMANDS)
