"""Files and folders that appear under their name only when they are whole."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from data_pipelines import atomic
from data_pipelines.atomic import (
    LOCK,
    STALE,
    replacing,
    run_lock,
    wait_until,
    write_json,
    write_npz,
    write_text,
)

WRITER = """
import sys, time
from pathlib import Path
from data_pipelines.atomic import replacing
with replacing(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half of it")
    time.sleep(60)
"""


def test_a_file_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": 1})
    with replacing(path) as partial:
        partial.write_text('{"a": 2}')
        assert partial.parent == path.parent and json.loads(path.read_text()) == {"a": 1}
    assert json.loads(path.read_text()) == {"a": 2}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_leaves_everything_as_it_was(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(error), replacing(tmp_path / "folder") as partial:
        (partial / "deep").mkdir(parents=True)
        raise error
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_only_the_neighbour_which_the_next_one_replaces(tmp_path):
    path, partial = tmp_path / "a", tmp_path / "a.partial"
    path.write_text("before")
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    while not partial.exists() or partial.read_bytes() != b"half of it":
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert path.read_text() == "before" and partial.exists()
    write_text(path, "after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_a_leftover_of_any_kind_is_replaced(tmp_path):
    (tmp_path / "a.partial" / "deep").mkdir(parents=True)
    (tmp_path / "a.partial" / "deep" / "file").write_text("half")
    write_text(tmp_path / "a", "whole")
    (tmp_path / "b.partial").write_text("half")
    with replacing(tmp_path / "b") as partial:
        partial.mkdir()
        (partial / "file").write_text("whole")
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "c.partial").symlink_to(kept, target_is_directory=True)
    write_text(tmp_path / "c", "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "c", "kept"]
    assert (tmp_path / "b" / "file").read_text() == "whole" and not (tmp_path / "c").is_symlink()


def test_a_folder_takes_the_place_of_nothing_or_of_an_empty_one(tmp_path):
    for _ in range(2):
        path = tmp_path / "folder"
        path.mkdir(exist_ok=True)
        with replacing(path) as partial:
            partial.mkdir()
        assert list(tmp_path.iterdir()) == [path]
    (path / "file").write_text("of somebody")
    with pytest.raises(FileExistsError, match="is not empty"), replacing(path):
        pytest.fail("what cannot be kept must not be written")
    assert (path / "file").read_text() == "of somebody"


def test_a_second_writer_makes_the_first_one_fail(tmp_path):
    """Nobody is told that a file is written which is not."""
    path = tmp_path / "a"
    with pytest.raises(FileNotFoundError), replacing(path) as first:
        first.write_text("of the first")
        with replacing(path) as second:
            second.write_text("of the second")
    assert path.read_text() == "of the second" and list(tmp_path.iterdir()) == [path]


def test_arrays_and_text_come_back(tmp_path):
    write_npz(tmp_path / "a.npz", x=np.arange(3), y=np.array("text"))
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["x"], [0, 1, 2])
        assert str(arrays["y"]) == "text"
    write_text(tmp_path / "a.txt", "µ\n")
    assert (tmp_path / "a.txt").read_bytes() == "µ\n".encode()
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert not (tmp_path / "a.json").exists()


def test_a_process_waits_for_what_another_one_writes(tmp_path):
    path = tmp_path / "a"
    writer = threading.Timer(0.1, write_text, (path, "whole"))
    writer.start()
    wait_until(path.exists)
    assert path.read_text() == "whole"
    writer.join()


HOLDER = """
import sys, time
from pathlib import Path
from data_pipelines.atomic import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_belongs_to_one_run_and_a_killed_run_leaves_no_lock(tmp_path):
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        refusal = f"process {holder.pid} on {socket.gethostname()} is writing to .*, since 20"
        with pytest.raises(OSError, match=refusal), run_lock(folder):
            pass
        holder.kill()
    with run_lock(folder):
        pass
    with run_lock(folder):  # and it is released at the end of the block
        pass
    assert list(folder.iterdir()) == []


def lock_of(folder, age=0.0, **changes):
    """A lock file as another process writes it, its last heartbeat `age` seconds ago."""
    record = {"id": "x", **atomic._machine(), "process": 1, "since": "2026-11-01 10:00:00"}
    (folder / LOCK).write_text(json.dumps(record | changes))
    os.utime(folder / LOCK, (time.time() - age,) * 2)


@pytest.mark.parametrize("locked", [True, None])  # with the system's lock, and without
def test_a_folder_of_another_machine_is_taken_over_when_its_heart_stops(
    tmp_path, monkeypatch, caplog, locked
):
    caplog.set_level("INFO", "data_pipelines")
    monkeypatch.setattr(atomic, "_flock", lambda descriptor: locked)
    monkeypatch.setattr(atomic, "_TAKING", 0.01)
    lock_of(tmp_path, age=STALE - 30, host="other")
    with pytest.raises(OSError, match=r"process 1 on other .* heartbeat was 150 s ago"):
        with run_lock(tmp_path):
            pass
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "other"
    lock_of(tmp_path, age=STALE + 1, host="other")
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert "from process 1 on other, which has ended" in caplog.text
    # The same name and number, but the machine was started again: of one that beats, not of ours.
    lock_of(tmp_path, boot="before")
    with pytest.raises(OSError, match="is writing"), run_lock(tmp_path):
        pass


def test_without_the_systems_lock_a_dead_process_is_known_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_flock", lambda descriptor: None)
    monkeypatch.setattr(atomic, "_TAKING", 0.01)
    with subprocess.Popen(["true"]) as ended:
        pass
    lock_of(tmp_path, process=ended.pid)
    with run_lock(tmp_path):
        pass
    lock_of(tmp_path, process=os.getpid())  # the first process of a container, started again
    with run_lock(tmp_path):
        pass
    lock_of(tmp_path, process=os.getppid())
    with pytest.raises(OSError, match=f"process {os.getppid()} on"), run_lock(tmp_path):
        pass
    lock_of(tmp_path, process=os.getppid(), age=STALE + 1)  # the number belongs to somebody else
    with run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_take_a_stale_folder_over_one_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_flock", lambda descriptor: None)
    monkeypatch.setattr(atomic.time, "sleep", lambda seconds: lock_of(tmp_path, host="faster"))
    lock_of(tmp_path, age=STALE + 1, host="other")
    with pytest.raises(OSError, match="on faster has just taken"), run_lock(tmp_path):
        pass
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "faster"


def test_a_held_folder_beats_and_an_unwritten_lock_file_is_not_an_ended_one(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "HEARTBEAT", 0.01)
    with run_lock(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        wait_until(lambda: (tmp_path / LOCK).stat().st_mtime > 0)
        lock_of(tmp_path, age=99, host="thief")  # a beat is for one's own file only
        time.sleep(0.1)
        assert time.time() - (tmp_path / LOCK).stat().st_mtime > 90
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "thief"
    (tmp_path / LOCK).write_text("")
    with pytest.raises(OSError, match="another process is writing"), run_lock(tmp_path):
        pass
