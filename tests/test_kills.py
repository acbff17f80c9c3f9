"""Killed at random moments, a run loses nothing; `python tests/kills.py` kills twenty times."""

import random
import shutil

import pytest
from kills import (
    broken_epochs,
    finish,
    kill_and_continue,
    largest_difference,
    samples,
    start,
    train_once,
    write_datasets,
)
from run_records import without_times

from mvjax.training.metrics import read_records

pytestmark = pytest.mark.usefixtures("quickly")
STEPS = 60  # four epochs of the smaller dataset, five of the larger
OTHER_MESH = "data=2 fsdp=2 context=2 tensor=1"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_datasets(folder)
    return folder


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory, quickly):
    workdir = tmp_path_factory.mktemp("straight")
    train_once(workdir, data, STEPS, {})
    return workdir


def test_two_kills_leave_no_trace(data, straight, tmp_path):
    """Once while it trains, once while it starts again."""
    reached = kill_and_continue(tmp_path, data, STEPS, 2, 3.0, random.Random())
    killed = read_records(tmp_path)
    assert reached and reached[0] > 0, "the run was not killed in its middle"
    assert [record["step"] for record in killed] == list(range(1, STEPS + 1))
    expected = without_times(read_records(straight))
    assert without_times(killed) == expected, f"killed after the steps {reached}"
    assert broken_epochs(samples(killed)) == []


def test_continued_on_another_mesh_it_sees_the_same_samples(data, straight, tmp_path):
    """Eight devices go on where one had saved its last checkpoint but two."""
    workdir = shutil.copytree(straight, tmp_path / "run")
    for step in (STEPS, STEPS - 10):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    finish(start(workdir, data, STEPS, OTHER_MESH))
    continued, before = read_records(workdir), read_records(straight)
    assert [record["step"] for record in continued] == list(range(1, STEPS + 1))
    assert without_times(continued) != without_times(before)
    assert samples(continued) == samples(before)
    assert largest_difference(continued, before) < 1e-5


def test_a_second_training_is_refused_and_the_first_goes_on(data, straight, tmp_path):
    with start(tmp_path, data, STEPS) as first:
        while not read_records(tmp_path):
            assert first.poll() is None, first.err
            first.wait(0.02)
        said = start(tmp_path, data, STEPS).finish()
        assert said.code == 1 and "is writing to" in said.err and "process" in said.err, said.err
        finish(first)
    assert without_times(read_records(tmp_path)) == without_times(read_records(straight))


def test_a_sample_twice_or_not_at_all_would_be_noticed(straight):
    seen = samples(read_records(straight))
    assert broken_epochs(seen) == []
    first = seen.index(17)
    seen[first] = 18
    assert broken_epochs(seen) == ["one, epoch 0"]
