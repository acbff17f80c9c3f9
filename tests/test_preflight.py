import os
import subprocess
import sys
from pathlib import Path

import mujoco
import pytest

from launch import preflight

ROOT = Path(__file__).parents[1]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these libraries")


def old_pythons() -> list[str]:
    """Interpreters of this machine that run but are too old."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [*pyenv.glob("versions/3.*/bin/python"), *Path("/usr/bin").glob("python3.?*")]
    found = []
    for path in sorted(candidates):
        command = [path, "-c", "import sys; sys.exit(not (3, 7) <= sys.version_info < (3, 11))"]
        if os.access(path, os.X_OK) and not subprocess.run(command, capture_output=True).returncode:
            found.append(str(path))
    return found


@pytest.fixture
def broken_gl(tmp_path, monkeypatch) -> Path:
    """Libraries without a single OpenGL function in front of the machine's own."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("libEGL.so", "libEGL.so.1", "libOSMesa.so", "libOSMesa.so.6", "libOSMesa.so.8"):
        (folder / name).symlink_to(next(Path(mujoco.__file__).parent.glob("libmujoco.so*")))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))
    return folder


def test_too_old_python_is_named():
    check = preflight.check_python((3, 9, 18))
    assert check.level == "problem"
    assert "needs Python 3.11 or newer; found: 3.9.18" in check.sentence
    assert preflight.check_python((3, 11, 0)).level == "ok"


def test_real_old_interpreters_get_the_sentence_instead_of_a_syntax_error():
    pythons = old_pythons()
    if not pythons:
        pytest.skip("no Python older than 3.11 on this machine")
    for python in pythons:
        result = subprocess.run(
            [python, "-m", "launch.preflight"], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 2
        assert "needs Python 3.11 or newer" in result.stdout
        assert result.stdout.count("\n") == 1 and not result.stderr


def test_a_run_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    check = preflight.check_writable(tmp_path / "file" / "run")
    assert check.level == "problem" and "Nothing can be written to" in check.sentence
    assert str(tmp_path / "file" / "run") in check.sentence


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    assert preflight.check_writable(tmp_path).level == "problem"


def test_the_checks_leave_no_trace(tmp_path):
    preflight.check_writable(tmp_path / "a" / "b")
    preflight.check_disk(tmp_path / "a" / "b", 0)
    assert list(tmp_path.iterdir()) == []


def test_disk_space_is_compared_with_the_need(tmp_path):
    assert preflight.check_disk(tmp_path / "new" / "run", 0).level == "ok"
    check = preflight.check_disk(tmp_path / "new" / "run", 1e9)
    assert check.level == "problem" and "GB are free" in check.sentence


def test_little_memory_is_only_a_warning():
    assert preflight.check_memory(1e9).level == "warning"
    assert preflight.check_memory(0).level == "ok"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < preflight.free_memory() <= total


@on_linux
def test_libraries_that_do_not_work_are_reported_not_raised(broken_gl, monkeypatch):
    assert preflight.find_rendering_backend() is None
    monkeypatch.setenv("MUJOCO_GL", "egl")
    check = preflight.check_rendering()
    assert check.level == "problem"
    assert "cannot render with MUJOCO_GL=egl" in check.sentence


def test_a_misspelt_backend_is_reported_with_mujocos_own_words(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "elg")
    check = preflight.check_rendering()
    assert check.level == "problem" and "elg" in check.sentence and "\n" not in check.sentence


@on_linux
def test_the_backend_that_is_found_renders(monkeypatch):
    backend = preflight.find_rendering_backend()
    if backend is None:
        pytest.skip("this machine cannot render")
    monkeypatch.setenv("MUJOCO_GL", backend)
    assert preflight.check_rendering().level == "ok"


def test_require_says_only_what_is_wrong_and_exits_with_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        preflight.require(tmp_path / "file" / "run", memory_gb=1e9)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "problem: Nothing can be written" in said and "warning: " in said
    assert "ok" not in [line.split(":")[0] for line in said.splitlines()]


def test_the_command_exits_with_2_and_prints_every_check(tmp_path):
    command = [sys.executable, "-m", "launch.preflight", "--run-dir", str(tmp_path / "run")]
    result = subprocess.run(
        [*command, "--disk-gb", "1e9"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    levels = [line.split()[0] for line in result.stdout.splitlines()]
    assert len(levels) == 5 and levels[2] == "problem"
