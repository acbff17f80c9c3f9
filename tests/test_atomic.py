"""Files and folders that appear under their name only when they are whole."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from data_pipelines.atomic import replacing, wait_until, write_json, write_npz, write_text

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
