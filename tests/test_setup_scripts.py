"""The shell set-up in real bash, with real environments; stand-ins: apt-get, sudo and uv."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import mujoco
import pytest

from launch import preflight

ROOT = Path(__file__).parents[1]
TOOLS = "bash cat dirname env id ls mkdir rm sed tail true uname".split()
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="nothing is to be installed there")


class Machine:
    """A repository with the scripts in it, and a PATH that holds nothing but what a test puts."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.repository = folder / "a repository"  # a space, as people have them
        self.bin = folder / "bin"
        (self.repository / "launch").mkdir(parents=True)
        for name in ("setup.sh", "quickstart.sh", "preflight.py", "__init__.py"):
            shutil.copy(ROOT / "launch" / name, self.repository / "launch")
        (self.repository / "requirements.txt").write_text("-e .[train]\n")
        (self.repository / "requirements-dev.txt").write_text("-e .[dev]\n")
        self.write_pyproject(train=["jax"], dev=["mvjax[train]", "pytest"])
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.environment = {"PATH": str(self.bin), "HOME": str(folder)}
        self.venv = self.repository / ".venv"

    def write_pyproject(self, line_length: int = 100, **extras: list[str]) -> None:
        (self.repository / "pyproject.toml").write_text(
            "[build-system]\nrequires = ['setuptools']\n"
            "[project]\nname = 'mvjax'\n"
            f"[project.optional-dependencies]\ntrain = {extras['train']}\ndev = {extras['dev']}\n"
            f"[tool.ruff]\nline-length = {line_length}\n"
        )

    def command(self, path: str, script: str) -> Path:
        """Puts a small program on the machine, by default on its PATH."""
        file = self.bin / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return file

    def fake_python(self, path: str, version: str, *, ready: bool = True) -> str:
        """An interpreter that answers the probe; returns the path that it says it has."""
        minor = version.split(".")[1]
        file = self.bin / path
        bare = "" if ready else 'case "$2" in *ensurepip*) exit 1 ;; esac; '
        self.command(path, f'{bare}echo "{minor} {version} {file}"')
        return str(file)

    def real_python(self, name: str = "python3") -> None:
        self.command(name, f'exec "{sys.executable}" "$@"')

    def run(self, commands: str, **environment) -> subprocess.CompletedProcess:
        """Runs bash commands after setup.sh, in another folder than the repository."""
        script = f'set -euo pipefail; source "{self.repository}/launch/setup.sh"; {commands}'
        return self.bash("-c", script, **environment)

    def bash(self, *arguments: str, **environment) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(self.bin / "bash"), *arguments],
            env={**self.environment, **environment},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def with_uv(machine) -> Path:
    """A uv that installs nothing and writes down how it was called; returns that list."""
    calls = machine.folder / "uv-calls"
    machine.command("uv", f'[ "$1" = --version ] || echo "$*" >>"{calls}"')
    machine.real_python()
    return calls


def test_shims_that_fail_are_passed_over(machine):
    machine.command("python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
    machine.command("python3.12", "exit 127")
    machine.real_python("python3")
    result = machine.run("choose_python")
    assert (result.returncode, result.stdout.strip()) == (0, sys.executable)
    assert result.stderr == ""


def test_the_newest_supported_interpreter_is_chosen_wherever_it_is(machine):
    machine.fake_python("python3", "3.11.2")
    newest = machine.fake_python("../.pyenv/versions/3.12.1/bin/python", "3.12.1")
    machine.fake_python("../.pyenv/versions/3.10.13/bin/python", "3.10.13")
    machine.fake_python("../.pyenv/versions/3.99.0/bin/python", "3.99.0")
    assert machine.run("choose_python").stdout.strip() == newest


def test_too_old_interpreters_are_all_named(machine):
    system = machine.fake_python("python3", "3.9.18")
    other = machine.fake_python("../.pyenv/versions/3.10.13/bin/python", "3.10.13")
    result = machine.run("choose_python")
    assert result.returncode == 2 and result.stdout == ""
    expected = f"mvjax needs Python 3.11 or newer (up to 3.13); found: 3.9.18 ({system}), 3.10.13"
    assert expected in result.stderr and other in result.stderr
    assert "PYTHON=" in result.stderr and result.stderr.count("\n") == 1


def test_a_machine_without_python_gets_the_sentence_from_the_script_itself(machine):
    result = machine.bash(str(machine.repository / "launch" / "quickstart.sh"))
    assert result.returncode == 2 and "found: none that runs" in result.stderr
    assert not machine.venv.exists()


def test_a_real_old_interpreter_is_refused(machine):
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    old = [p for p in pyenv.glob("versions/*/bin/python") if p.parts[-3][:4] in ("2.7.", "3.9.")]
    if not old:
        pytest.skip("no old Python on this machine")
    for python in old:
        result = machine.run("ensure_environment requirements.txt", PYTHON=str(python))
        assert result.returncode == 2 and f"({python}" in result.stderr


def test_PYTHON_overrides_the_choice_and_must_run(machine):
    machine.fake_python("python3.13", "3.13.0")
    chosen = machine.fake_python("elsewhere/python", "3.11.7")
    assert machine.run("choose_python", PYTHON=chosen).stdout.strip() == chosen
    result = machine.run("choose_python", PYTHON="/no/such/python")
    assert result.returncode == 2 and "none that runs (PYTHON=/no/such/python)" in result.stderr


def test_uv_brings_a_python_where_none_is_supported(machine):
    machine.fake_python("python3", "3.9.18")
    machine.command("uv", '[ "$1 $2" != "python find" ] || echo /from/uv/python3.12')
    assert machine.run("choose_python").stdout.strip() == "/from/uv/python3.12"
    old = machine.fake_python("elsewhere/python", "3.10.1")
    assert machine.run("choose_python", PYTHON=old).returncode == 2  # a person's choice stands


def test_python_without_ensurepip_names_the_package_to_install(machine):
    python = machine.fake_python("python3", "3.11.2", ready=False)
    result = machine.run("choose_python")
    assert result.returncode == 2
    assert "sudo apt-get install -y python3.11-venv" in result.stderr
    machine.command("uv", "exit 0")  # brings its own installer
    assert machine.run("choose_python").stdout.strip() == python


def test_root_installs_the_missing_venv_package(machine):
    python = machine.fake_python("python3", "3.11.2", ready=False)
    machine.command("id", "echo 0")
    machine.command("apt-get", f'echo "$*" >>"{machine.folder}/apt"')
    assert machine.run("choose_python").stdout.strip() == python
    calls = (machine.folder / "apt").read_text().splitlines()
    assert calls[0].startswith("update") and calls[1].endswith(" python3.11-venv")


def test_an_environment_is_made_once_and_then_left_alone(machine, with_uv):
    result = machine.run('ensure_environment requirements.txt; "$python" -c "print(40 + 2)"')
    assert (result.returncode, result.stdout.strip()) == (0, "42"), result.stderr
    assert with_uv.read_text().count("\n") == 1
    again = machine.run("ensure_environment requirements.txt")
    assert again.returncode == 0 and again.stderr == ""
    assert with_uv.read_text().count("\n") == 1


def test_development_packages_are_added_and_cover_the_others(machine, with_uv):
    machine.run("ensure_environment requirements.txt")
    (machine.venv / "kept").touch()
    machine.run("ensure_environment requirements-dev.txt; ensure_environment requirements.txt")
    files = [line.split("/")[-1] for line in with_uv.read_text().splitlines()]
    assert files == ["requirements.txt", "requirements-dev.txt"]
    assert (machine.venv / "kept").exists()


@pytest.mark.parametrize(
    "changed", [{"train": ["jax<2"], "dev": ["pytest"]}, {"train": ["jax"], "dev": ["ruff"]}]
)
def test_changed_packages_are_installed(machine, with_uv, changed):
    machine.write_pyproject(train=["jax"], dev=["pytest"])
    machine.run("ensure_environment requirements-dev.txt")
    machine.write_pyproject(**changed)
    assert machine.run("ensure_environment requirements-dev.txt").returncode == 0
    assert with_uv.read_text().count("\n") == 2


def test_a_changed_requirements_file_is_installed(machine, with_uv):
    machine.run("ensure_environment requirements-dev.txt")
    (machine.repository / "requirements-dev.txt").write_text("-e .[dev,torch]\n")
    assert machine.run("ensure_environment requirements-dev.txt").returncode == 0
    assert with_uv.read_text().count("\n") == 2


def test_settings_of_other_tools_install_nothing(machine, with_uv):
    machine.run("ensure_environment requirements-dev.txt")
    machine.write_pyproject(train=["jax"], dev=["mvjax[train]", "pytest"], line_length=80)
    again = machine.run("ensure_environment requirements-dev.txt")
    assert again.returncode == 0 and again.stderr == ""
    assert with_uv.read_text().count("\n") == 1


def test_a_list_that_does_not_name_the_project_stands_for_itself(machine, with_uv):
    (machine.repository / "requirements-libero.txt").write_text("bddl\n")
    machine.run("ensure_environment requirements-libero.txt")
    machine.write_pyproject(train=["jax<2"], dev=["pytest"])
    machine.run("ensure_environment requirements-libero.txt")
    assert with_uv.read_text().count("\n") == 1
    machine.run("ensure_environment requirements.txt")
    assert with_uv.read_text().count("\n") == 2


def test_the_project_is_installed_from_its_own_folder(machine, with_uv):
    calls = machine.folder / "folders"
    machine.command("uv", f'[ "$1" = --version ] || pwd >>"{calls}"')
    machine.run("ensure_environment requirements.txt")
    assert calls.read_text() == f"{machine.repository}\n"


def test_an_installation_that_was_killed_is_started_afresh(machine, with_uv):
    good_uv = (machine.bin / "uv").read_text()
    machine.command("uv", '[ "$1" = --version ] || kill -9 $PPID')
    assert machine.run("ensure_environment requirements.txt").returncode == -9
    (machine.venv / "lib" / "half a package").touch()
    machine.command("uv", good_uv)
    result = machine.run("ensure_environment requirements.txt")
    assert result.returncode == 0 and "did not finish: starting afresh" in result.stderr
    assert not (machine.venv / "lib" / "half a package").exists()


def test_two_installations_at_once_are_refused(machine, with_uv):
    machine.venv.mkdir()
    (machine.venv / ".half-installed").write_text(f"{os.getpid()}\n")
    result = machine.run("ensure_environment requirements.txt")
    assert result.returncode == 2 and f"process {os.getpid()} is installing" in result.stderr


def test_a_folder_that_is_not_ours_is_never_removed(machine, with_uv):
    precious = machine.folder / "my files"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    result = machine.run("ensure_environment requirements.txt", MVJAX_VENV="my files")
    assert result.returncode == 2 and "was not made by this script" in result.stderr
    assert (precious / "thesis.tex").exists()


def test_pip_takes_over_from_uv_and_a_failed_addition_keeps_what_worked(machine, with_uv):
    machine.run("ensure_environment requirements.txt")
    machine.command("uv", '[ "$1" = --version ]')
    (machine.repository / "requirements-dev.txt").write_text("this is not a requirement\n")
    result = machine.run("ensure_environment requirements-dev.txt")
    log = machine.venv / "install.log"
    assert result.returncode == 2 and f"The full log is {log}" in result.stderr
    assert "Invalid requirement" in log.read_text()
    assert machine.run("ensure_environment requirements.txt").stderr == ""
    (machine.repository / "requirements-dev.txt").write_text("# nothing\n")
    assert machine.run("ensure_environment requirements-dev.txt").returncode == 0


def test_quickstart_hands_on_every_flag_and_runs_in_the_repository(machine, with_uv):
    (machine.repository / "launch" / "quickstart.py").write_text(
        "import os, sys\nprint(os.getcwd(), sys.argv[1:], os.environ.get('PYTHONPATH'))\n"
    )
    script = str(machine.repository / "launch" / "quickstart.sh")
    result = machine.bash(script, "--study", "a b", MUJOCO_GL="egl", PYTHONPATH="/opt/ros")
    assert result.stdout == f"{machine.repository} ['--study', 'a b'] None\n", result.stderr
    assert machine.bash(script, MUJOCO_GL="egl").stdout == f"{machine.repository} [] None\n"


@pytest.fixture
def broken_gl(machine) -> Path:
    """Libraries without a single OpenGL function in front of the machine's own."""
    broken = machine.folder / "broken"
    broken.mkdir()
    for name in ("libEGL.so", "libEGL.so.1", "libOSMesa.so", "libOSMesa.so.6", "libOSMesa.so.8"):
        (broken / name).symlink_to(next(Path(mujoco.__file__).parent.glob("libmujoco.so*")))
    machine.environment["LD_LIBRARY_PATH"] = str(broken)
    machine.venv.mkdir()
    return broken


@on_linux
def test_missing_opengl_names_the_packages(machine, broken_gl):
    machine.command("id", "echo 1000")
    machine.command("apt-get", f'echo "$*" >>"{machine.folder}/apt"')
    result = machine.run(f"python='{sys.executable}'; ensure_gl")
    assert result.returncode == 1 and "sudo apt-get install -y libegl1" in result.stderr
    assert not (machine.folder / "apt").exists()
    assert not (machine.venv / ".mujoco-gl").exists()


@on_linux
def test_root_installs_opengl_and_the_backend_is_remembered(machine, broken_gl):
    if preflight.rendering_error("egl") is not None:
        pytest.skip("this machine cannot render")
    machine.command("id", "echo 0")
    machine.command("apt-get", f'[ "$1" = update ] || rm "{broken_gl}"/*')
    commands = f"python='{sys.executable}'; ensure_gl; echo $MUJOCO_GL"
    result = machine.run(commands)
    assert (result.returncode, result.stdout.strip()) == (0, "egl"), result.stderr
    assert "with apt-get" in result.stderr
    again = machine.run(commands)
    assert again.stdout.strip() == "egl" and again.stderr == ""


# The packages and their lowest versions.


def requirement_lines(path: Path) -> list[str]:
    lines = (line.partition(" #")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_every_requirement_has_a_lowest_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    listed += requirement_lines(ROOT / "requirements-libero.txt")
    unbounded = [line for line in listed if not re.search(r">=|==|^mvjax\[", line)]
    assert not unbounded


def test_requirement_lists_agree_with_pyproject():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for path in ROOT.glob("requirements*.txt"):
        if path.name != "requirements-libero.txt":
            (line,) = requirement_lines(path)
            assert set(re.fullmatch(r"-e \.\[([\w,]+)\]", line)[1].split(",")) <= extras.keys()
    # LIBERO's own Python has older packages only where it must: numpy 1.
    found = subprocess.run(
        [sys.executable, ROOT / ".ci" / "lowest.py", "train", "sim", "dev"],
        capture_output=True,
        text=True,
        check=True,
    )
    ours = dict(line.split("==") for line in found.stdout.split())
    assert ours["numpy"] == "2.2" and ours["av"] == "17" and ours["websockets"] == "14"
    for line in requirement_lines(ROOT / "requirements-libero.txt"):
        name, _, lowest = re.match(r"([\w-]+)(>=|==)([\w.]+)", line).groups()
        if name in ours and name not in ("numpy", "mujoco"):
            assert lowest == ours[name], line
