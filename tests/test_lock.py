"""A folder has one owner: who is refused, and when an owner counts as ended."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from data_pipelines import lock
from data_pipelines.atomic import wait_until
from data_pipelines.lock import LOCK, STALE, run_lock

OWNER = """
import sys, time
from pathlib import Path
from data_pipelines.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(60)
"""
WITHOUT_FLOCK = """
from data_pipelines import lock
lock.HEARTBEAT, lock._flock = 0.3, lambda descriptor: None
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "_SETTLING", 0.01)
    monkeypatch.setattr(lock, "_POLL", 0.01)
    monkeypatch.setattr(lock, "_WATCHED", 0.05)


@pytest.fixture(params=[True, None], ids=["with_flock", "without"])
def flock(request, monkeypatch):
    """The system's lock as ours, as also where it does not reach another machine; and none."""
    monkeypatch.setattr(lock, "_flock", lambda descriptor: request.param)


@contextmanager
def another_process(folder, program=OWNER):
    with subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE) as owner:
        try:
            assert owner.stdout.readline() == b"owned\n"
            yield owner
        finally:
            owner.kill()


def lock_of(folder, age=0.0, **changes):
    """A lock file as another process writes it, its last heartbeat `age` seconds ago."""
    record = {"id": "x", **lock._machine(), **lock._numbering(), "process": 1}
    record["since"] = "2026-11-01 10:00:00"
    (folder / LOCK).write_text(json.dumps(record | changes))
    os.utime(folder / LOCK, (time.time() - age,) * 2)


def refused(folder, who):
    with pytest.raises(OSError, match=f"{who}.* is writing to"), run_lock(folder):
        pass
    return True


def taken(folder):
    with run_lock(folder):
        return json.loads((folder / LOCK).read_text())["process"] == os.getpid()


def test_a_folder_belongs_to_one_run_and_a_killed_run_leaves_no_lock(tmp_path):
    folder, copy = tmp_path / "run", tmp_path / "copy"
    with another_process(folder) as owner:
        assert refused(folder, f"process {owner.pid} on {socket.gethostname()}")
        shutil.copytree(folder, copy)
        assert taken(copy)  # its lock file names a living process, which has another folder
    assert (folder / LOCK).exists() and taken(folder)
    assert taken(folder)  # and it is released at the end of the block
    assert list(folder.iterdir()) == list(copy.iterdir()) == []


def test_a_folder_of_another_machine_is_taken_over_when_its_heart_stops(tmp_path, flock, caplog):
    caplog.set_level("INFO", "data_pipelines")
    lock_of(tmp_path, age=STALE + 1, host="other")
    assert taken(tmp_path)
    assert "from process 1 on other, which has ended" in caplog.text
    lock_of(tmp_path, age=STALE - 0.3, host="other")  # restarted elsewhere after it was killed
    assert taken(tmp_path)
    assert "names process 1 on other, whose last heartbeat was 180 s ago" in caplog.text


# The same name and number, but the machine was started again: of one that beats, not of ours.
@pytest.mark.parametrize("other", [{"host": "other"}, {"boot": "before"}])
def test_an_owner_on_another_machine_that_beats_is_left_alone(tmp_path, flock, other):
    lock_of(tmp_path, age=60, **other)
    beat = threading.Timer(0.2, os.utime, [tmp_path / LOCK])
    beat.start()
    assert refused(tmp_path, "process 1 on")
    assert json.loads((tmp_path / LOCK).read_text())["id"] == "x"
    beat.join()


def test_an_owner_whose_clock_is_late_is_left_alone(tmp_path, flock, monkeypatch):
    """Its beats have the time of five minutes ago, by the clock of this machine."""
    monkeypatch.setattr(lock, "_WATCHED", 5.0)
    lock_of(tmp_path, age=300, host="other")
    beat = threading.Timer(0.2, os.utime, [tmp_path / LOCK, (time.time() - 299,) * 2])
    beat.start()
    assert refused(tmp_path, "process 1 on other")
    beat.join()


def test_without_the_systems_lock_a_dead_process_is_known_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_flock", lambda descriptor: None)
    with subprocess.Popen(["true"]) as ended:
        pass
    lock_of(tmp_path, process=ended.pid)
    assert taken(tmp_path)
    lock_of(tmp_path, process=os.getpid())  # the first process of a container, started again
    assert taken(tmp_path)
    lock_of(tmp_path, process=os.getppid(), age=STALE + 1)  # the number belongs to somebody else
    assert taken(tmp_path)
    with another_process(tmp_path, WITHOUT_FLOCK + OWNER) as owner:
        assert refused(tmp_path, f"process {owner.pid} on")
    assert taken(tmp_path) and list(tmp_path.iterdir()) == []


def test_a_number_of_another_container_is_no_process_of_this_one(tmp_path, monkeypatch):
    """As of containers with the host's name on a network disk, where all are number 1."""
    monkeypatch.setattr(lock, "_flock", lambda descriptor: None)
    with subprocess.Popen(["true"]) as ended:
        pass
    for process in (os.getpid(), ended.pid):
        lock_of(tmp_path, process=process, numbering="pid:[1]")
        beat = threading.Timer(0.2, os.utime, [tmp_path / LOCK])
        beat.start()
        assert refused(tmp_path, f"process {process} on")
        beat.join()


def test_a_clock_that_was_set_back_keeps_no_folder(tmp_path, flock, monkeypatch, caplog):
    caplog.set_level("INFO", "data_pipelines")
    monkeypatch.setattr(lock, "STALE", 0.3)
    lock_of(tmp_path, age=-3600, host="other")
    assert taken(tmp_path)
    assert "last heartbeat was 0 s ago; waiting for the next one, at most 0 s" in caplog.text


def test_of_two_that_take_a_folder_over_one_has_it(tmp_path, flock, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: lock_of(tmp_path, host="faster"))
    lock_of(tmp_path, age=STALE + 1, host="other")
    assert refused(tmp_path, "process 1 on faster")
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "faster"


def test_an_owner_beats_and_says_when_the_folder_was_taken_from_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    with run_lock(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        wait_until(lambda: (tmp_path / LOCK).stat().st_mtime > 0)
        lock_of(tmp_path, age=99, host="thief")  # as after a machine was suspended for minutes
        wait_until(lambda: "process 1 on thief has taken" in caplog.text)
        assert time.time() - (tmp_path / LOCK).stat().st_mtime > 90
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "thief"


def test_an_unwritten_lock_file_is_not_that_of_an_ended_process(tmp_path, flock):
    (tmp_path / LOCK).write_text("")
    writer = threading.Timer(0.2, lock_of, [tmp_path], {"host": "other"})
    writer.start()
    assert refused(tmp_path, "process 1 on")
    writer.join()
