"""Several processes: the losses of one, the death of one, and a restart with another number."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import jax
import numpy as np
import psutil
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_stages import tiny_batch, tiny_config
from toy_processes import train_toys

from data_pipelines.atomic import write_json, write_npz
from data_pipelines.records import RecordWriter, write_texts
from launch.local import free_port
from mvjax.experiment import Experiment
from mvjax.parallel import make_mesh
from mvjax.training.metrics import read_records
from mvjax.training.prefetch import local_rows
from mvjax.training.run import run

pytestmark = pytest.mark.usefixtures("quickly")
ROOT = Path(__file__).parents[1]
CONFIG = """
from tiny_stages import tiny_config

def get_config(argument):
    records, steps = argument.split(",")
    config = tiny_config("video", steps=int(steps))
    robot = config.datasets.robot
    robot.records = records
    config.datasets = {"robot": robot}
    config.training.sample_every = 0  # there are no held-out records
    return config
"""
FOREVER = 100_000
UNLUCKY = """
import jax
from mvjax import parallel

with parallel.initialized():
    if jax.process_index() == 1:
        raise ValueError("thirteen steps bring bad luck.")
    parallel.everywhere(True)  # waits for the other, in vain
"""

LATE = """
import time
import jax
from mvjax import parallel

with parallel.initialized():
    parallel.everywhere(True)
    time.sleep(jax.process_index())  # process 0 holds what connects them
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A records folder of 40 windows of noise, and a configuration file that trains on it."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "config.py").write_text(CONFIG)
    config = tiny_config("video")
    config.training.batch_size = 40
    batch, records = tiny_batch(config), folder / "records"
    records.mkdir()
    with RecordWriter(records / "shard_0.arrayrecord") as writer:
        for i in range(40):
            row = {name: batch[name][i] for name in ("latents", "actions", "proprio")}
            writer.write(row | {"episode": np.int64(i // 10), "text": np.int64(0)})
    columns = {name: batch[name] for name in ("actions", "proprio")}
    write_npz(records / "shard_0.npz", anchor=np.arange(40), **columns)
    write_texts(records / "texts.npz", ["press the button"], batch["text"][:1])
    rows = [
        dict(id=f"{e}", instructions=[0], first=10 * e, count=10, split="train") for e in range(4)
    ]
    settings = {name: config[name].to_dict() for name in ("clip", "policy_io")}
    settings |= {"dataset": {"name": "robot"}, "identity": {}}
    manifest = dict(settings=settings, fingerprint="noise", shards=["shard_0.arrayrecord"])
    write_json(records / "manifest.json", manifest | dict(skipped=[], episodes=rows))
    return folder


def config_of(folder, steps):
    """Flags and value of a stage-1 configuration on these records."""
    argument = f"{folder / 'records'},{steps}"
    namespace = {}
    exec(CONFIG, namespace)
    return f"--config={folder / 'config.py'}:{argument}", namespace["get_config"](argument)


def start(processes, *command, path=ROOT / "tests"):
    """A command in several processes, as in a shell."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles four times faster
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "PYTHONPATH": f"{ROOT}:{path}",
    }
    launcher = [sys.executable, "-m", "launch.local", f"--processes={processes}", "--"]
    words = [*launcher, *map(str, command)]
    return subprocess.Popen(words, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def together(count, *command):
    """The processes of one run, forked: they start at once, but nobody stops them together."""
    coordinator, processes = f"127.0.0.1:{free_port()}", contextlib.ExitStack()
    with processes:
        yield [
            processes.enter_context(
                forked.Program(*command, environment=place(index, count, coordinator))
            )
            for index in range(count)
        ]


def place(index, count, coordinator):
    """The variables that tell a process its place among the others."""
    return {
        "MVJAX_COORDINATOR": coordinator,
        "MVJAX_PROCESS_COUNT": str(count),
        "MVJAX_PROCESS_ID": str(index),
    }


def finish(process, seconds=200):
    """(exit code, what it said)."""
    try:
        said = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        for _ in range(2):  # the second one ends it at once
            process.terminate()
            time.sleep(0.2)
        pytest.fail(f"it did not end: {process.communicate()[1]}")
    return process.returncode, said


def child(process, index):
    """Process `index` of those that a launcher started."""
    for candidate in psutil.Process(process.pid).children():
        if candidate.environ().get("MVJAX_PROCESS_ID") == str(index):
            return candidate
    raise LookupError(f"there is no process {index}")


def losses(workdir):
    return {int(record["step"]): record["loss"] for record in read_records(workdir)}


def assert_same_losses(ours, theirs):
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


@pytest.fixture(scope="module")
def straight(folder, quickly):
    """straight(steps) -> the records of so many steps in a single process on one device."""

    def records(steps):
        train_toys(folder / "straight", steps)  # goes on, or has them already
        return read_records(folder / "straight")[:steps]

    return records


@pytest.fixture(scope="module")
def broken(folder):
    """A run of two processes, one of which is killed: (workdir, exit code, words, seconds)."""
    workdir = folder / "killed"
    process = start(2, "toy_processes", workdir, FOREVER)
    while not (workdir / "checkpoints" / "5").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    child(process, 1).kill()
    began = time.monotonic()
    code, said = finish(process)
    return workdir, code, said, time.monotonic() - began


def test_when_one_process_is_killed_the_others_stop_and_it_is_said(broken):
    _, code, said, seconds = broken
    assert code == 128 + signal.SIGKILL and seconds < 60
    sentence = "launch.local: process 1 of 2 was killed by SIGKILL; the others are stopped."
    assert said.splitlines()[-1] == sentence


def test_a_restart_resumes_and_sigterm_to_one_process_saves_the_same_step_of_all(broken, straight):
    workdir = broken[0]
    before = max(losses(workdir))
    process = start(2, "toy_processes", workdir, FOREVER)
    while max(losses(workdir)) == before:  # the steps after the checkpoint are dropped at the start
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    child(process, 1).terminate()  # while it still compiles
    code, said = finish(process)
    stopped = max(losses(workdir))
    assert code == 0 and f"continuing {workdir} at step " in said, said
    assert said.count(f"stopping at step {stopped}, saved; run the same command") == 1
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    # The rest in a single process with a mesh of four devices.
    words = workdir, stopped + 3, "fsdp=2", "context=2"
    assert forked.run("toy_processes", *words, devices=4).code == 0
    ours, theirs = read_records(workdir), straight(stopped + 3)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    assert [r["first_sample"] for r in ours] == [r["first_sample"] for r in theirs]
    np.testing.assert_allclose(*([r["loss"] for r in run] for run in (ours, theirs)), rtol=1e-5)


def test_four_processes_of_which_two_share_their_samples_train_and_stop_as_one(folder, straight):
    """fsdp 2 x context 2: each pair of processes holds the same half of the batch."""
    workdir = folder / "four"
    with together(4, "toy_processes", workdir, FOREVER, "fsdp=2", "context=2") as processes:
        while len(losses(workdir)) < 6:
            assert all(process.poll() is None for process in processes), processes[0].err
            time.sleep(0.02)
        processes[2].terminate()
        assert [process.wait(60) for process in processes] == [0, 0, 0, 0], processes[0].err
        said = processes[0].err
    ours = losses(workdir)
    assert f"stopping at step {max(ours)}, saved" in said, said
    assert_same_losses(
        {step: ours[step] for step in range(1, 7)}, {r["step"]: r["loss"] for r in straight(6)}
    )


def test_an_error_in_one_process_ends_the_others_at_once_with_its_sentence(folder):
    (folder / "unlucky.py").write_text(UNLUCKY)
    began = time.monotonic()
    code, said = finish(start(2, "unlucky", path=folder))
    assert code == 2 and time.monotonic() - began < 60
    reason = "saying 'ValueError: thirteen steps bring bad luck.'; the others are stopped."
    assert said.splitlines()[-1] == f"launch.local: process 1 of 2 ended with code 2, {reason}"


def test_a_process_that_ends_first_waits_for_the_others(tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text(LATE)
    monkeypatch.syspath_prepend(tmp_path)
    with together(2, "late") as processes:
        assert [process.wait() for process in processes] == [0, 0], processes[1].err


def test_the_real_command_in_two_processes_equals_one(folder):
    flag, config = config_of(folder, 3)
    with together(2, "launch.train", flag, f"--workdir={folder / 'video'}") as processes:
        codes = [process.wait() for process in processes]
        said = processes[0].err, processes[1].err
    assert codes == [0, 0] and "3/3" in said[0] and not said[1], said
    run(Experiment.from_config(config), folder / "video_straight")
    assert_same_losses(losses(folder / "video"), losses(folder / "video_straight"))


def test_an_evaluation_in_two_processes_shares_its_episodes(folder):
    pytest.importorskip("metaworld", reason="plays Meta-World")
    words = ["--modes=none", f"--out={folder / 'evaluation'}", "--config.evaluation.max_steps=3"]
    words += ["--config.evaluation.videos_per_task=0", "--config.evaluation.workers=1"]
    flag = "--config=configs/quickstart_action.py:smoke"
    with together(2, "launch.evaluate", flag, *words) as processes:
        assert [process.wait() for process in processes] == [0, 0], [p.err for p in processes]
    ours = folder / "evaluation" / "none"
    lines = [(ours / name).read_text().count("\n") for name in ("results.jsonl", "results_1.jsonl")]
    assert lines == [2, 1]  # the first has put both together


def test_a_process_that_meets_no_other_says_so(tmp_path, monkeypatch):
    program = "from mvjax.parallel import *\nwith initialized(start_seconds=1): pass"
    (tmp_path / "alone.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    for count, words in (
        ("2", "process 1 of 2 (coordinator 127.0.0.1:9) has not met all the others within"),
        ("", "MVJAX_COORDINATOR and MVJAX_PROCESS_ID is set; set all of"),
    ):
        said = forked.run("alone", environment=place(1, count, "127.0.0.1:9"))
        assert said.code != 0 and words in said.err.splitlines()[-1]


def test_rows_of_a_batch_follow_the_mesh_and_must_divide_it():
    mesh = make_mesh({"data": -1})
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    count = 6 * mesh.size
    assert local_rows(sharding, count).tolist() == list(range(count))
    wide = NamedSharding(jax.sharding.AbstractMesh((4,), ("data",)), PartitionSpec("data"))
    with pytest.raises(ValueError, match="cannot reshape"):
        local_rows(wide, 6)
