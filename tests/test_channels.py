"""What people look at while a run trains may fail, for a while or for good; the run goes on."""

import errno
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from run_records import without_times
from toy_training import toy_config, toy_loader, train_toy

from data_pipelines.atomic import wait_until
from data_pipelines.progress import Bar
from launch.entry import _Stderr
from mvjax.training import channels
from mvjax.training.channels import Channel, TensorBoard
from mvjax.training.metrics import read_records

pytestmark = pytest.mark.usefixtures("quickly")


@pytest.fixture(autouse=True)
def soon(monkeypatch, caplog):
    """What failed is tried again at once."""
    monkeypatch.setattr(channels, "RETRY", 0.0)
    caplog.set_level("INFO", "mvjax")


class Eventful:
    """The toy loader, with something that happens before each batch."""

    def __init__(self, happens):
        self._loader, self._happens, self._given = toy_loader(), happens, 0
        self.get_state, self.set_state = self._loader.get_state, self._loader.set_state

    def __iter__(self):
        return self

    def __next__(self):
        self._given += 1
        self._happens(self._given)
        return next(self._loader)


def steps_in(folder):
    """How often each step is named in the TensorBoard files of a folder."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at + 12 <= len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            if at + 16 + size > len(content):  # where the disk was full
                break
            event = Event.FromString(content[at + 12 : at + 12 + size])
            found += [event.step for value in event.summary.value if value.tag == "loss"]
            at += 16 + size
    return found


def test_records_that_cannot_be_written_wait_and_tensorboard_goes_on_without(tmp_path, caplog):
    train_toy(tmp_path / "straight", toy_config(steps=12))
    workdir = tmp_path / "run"
    workdir.mkdir()
    records, board = workdir / "metrics.jsonl", workdir / "tensorboard"
    board.write_text("a file where the folder should be")

    def happens(batch):
        if batch == 5:
            records.rename(workdir / "aside")
            records.mkdir()
        if batch == 9:
            records.rmdir()
            (workdir / "aside").rename(records)
            wait_until(lambda: "TensorBoard failed" in caplog.text)
            board.unlink()

    config = toy_config(steps=12, checkpoint_every=100)
    assert train_toy(workdir, config, loader=Eventful(happens))["step"] == 12
    expected = without_times(read_records(tmp_path / "straight"))
    assert without_times(read_records(workdir)) == expected
    seen = steps_in(board)
    assert seen == sorted(set(seen)) and 12 in seen and 1 not in seen
    for said in ("metrics.jsonl failed (IsADirectoryError", "TensorBoard failed (FileExistsError"):
        assert caplog.text.count(said) == 1, caplog.text  # once, however often it failed
    assert "metrics.jsonl works again, after" in caplog.text
    assert "TensorBoard works again, after" in caplog.text


def test_records_half_written_are_completed(tmp_path):
    """A write that fails in its middle leaves no torn line before the next one."""
    records = tmp_path / "metrics.jsonl"

    def happens(batch):
        if batch == 6:
            with records.open("a") as file:
                file.write('{"step": 99, "lo')

    train_toy(tmp_path, toy_config(steps=6), loader=Eventful(happens))
    assert [r["step"] for r in read_records(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert records.read_text().count("\n") == 6 and '"step": 99' not in records.read_text()


def test_records_that_cannot_be_read_wait_and_spoilt_ones_are_left_out(tmp_path, monkeypatch):
    """As after a power failure, and on a network that is away when the run continues."""
    train_toy(tmp_path, toy_config(steps=2))
    records, read, away = tmp_path / "metrics.jsonl", Path.read_bytes, [True]
    with records.open("ab") as file:
        file.write(b'\0\0\0\n\xff\xfe\x80\n5\n{"loss": 1}\n')

    def read_bytes(path):
        if path == records and away:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    happens = lambda batch: away.clear() if batch == 4 else None  # noqa: E731
    train_toy(tmp_path, toy_config(steps=6), loader=Eventful(happens))
    assert [r["step"] for r in read_records(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert len(records.read_text().splitlines()) == 6


def test_a_full_disk_costs_tensorboard_only_what_does_not_fit(tmp_path, caplog):
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux may mount a small disk")
    options = ["-t", "tmpfs", "-o", "size=16k", "none", str(tmp_path)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        board = Channel("TensorBoard", lambda: TensorBoard(tmp_path / "tensorboard", None))
        values = {"loss": 1.0, **{f"level_{i}": float(i) for i in range(20)}}
        step = 0
        while "TensorBoard failed" not in caplog.text:
            step += 1
            board.put(lambda sink, step=step: sink.numbers(step, values))
            time.sleep(0.001)
            assert step < 1000
        assert "No space left on device" in caplog.text
        subprocess.run(["mount", "-o", "remount,size=1m", str(tmp_path)], check=True)
        board.put(lambda sink: sink.numbers(5000, values))
        board.close()
        seen = steps_in(tmp_path / "tensorboard")
        assert seen[:3] == [1, 2, 3] and seen[-1] == 5000
        assert "TensorBoard works again" in caplog.text
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_channel_that_hangs_holds_nobody_up(caplog):
    ends, began = threading.Event(), time.monotonic()

    class Hanging:
        def numbers(self, step, values):
            ends.wait(60)

    channel = Channel("Weights & Biases", Hanging, room=3)
    for step in range(20):
        channel.put(lambda sink, step=step: sink.numbers(step, {}))
    channel.close(seconds=0.2)
    assert time.monotonic() - began < 10
    assert "Weights & Biases failed (it does not keep up: 3 entries wait)" in caplog.text
    assert "Weights & Biases does not answer; its last entries are left out" in caplog.text
    ends.set()


def test_a_profile_that_cannot_be_written_is_left_out(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file where the folder should be")
    assert train_toy(tmp_path, toy_config(steps=8), profile=True)["step"] == 8
    assert "the profiler failed" in caplog.text


def test_a_validation_that_fails_is_said_and_the_run_is_the_same(tmp_path, caplog):
    def validation(step, params):
        if step < 6:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return {"validation/loss": 1.0}, {}

    config = toy_config(steps=8, sample_every=2)
    train_toy(tmp_path, config, validation=validation)
    records = read_records(tmp_path)
    assert [r["step"] for r in records if "validation/loss" in r] == [6, 8]
    assert caplog.text.count("validation failed") == 1
    assert "validation works again, after 2 failures" in caplog.text


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has it")
def test_a_log_on_a_full_disk_stops_nothing(tmp_path, monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        with pytest.raises(OSError):
            print("text", file=full, flush=True)
        monkeypatch.setattr(sys, "stderr", full)
        record = logging.makeLogRecord({"msg": "text"})
        _Stderr().emit(record)
        assert train_toy(tmp_path)["step"] == 4
        with Bar(range(3), file=full) as bar:  # as of an encoding job or an evaluation
            bar.write("skipped", file=full)
            assert list(bar) == [0, 1, 2]
        monkeypatch.undo()
        with pytest.raises(OSError):  # what is left in it cannot be written either
            full.close()


def test_pictures_reach_tensorboard(tmp_path):
    board = Channel("TensorBoard", lambda: TensorBoard(tmp_path, 1))
    board.put(lambda sink: sink.pictures(3, {"samples/0": np.zeros((8, 8, 3), np.uint8)}))
    board.close()
    (events,) = tmp_path.iterdir()
    assert b"samples/0" in events.read_bytes() and b"\x89PNG" in events.read_bytes()
