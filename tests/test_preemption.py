"""A run that is asked to stop saves what it has, whatever it waits for and however often."""

import signal
import threading

import pytest
from run_records import without_times
from toy_training import toy_config, toy_loader, train_toy

from mvjax.training import preemption
from mvjax.training.checkpoint import Store
from mvjax.training.metrics import read_records

pytestmark = pytest.mark.usefixtures("quickly")


class Signalling:
    """The toy loader; before the fourth batch come signals, and the batch only if nothing hangs."""

    def __init__(self, *numbers: int, hangs: bool = False):
        self._loader, self._numbers, self._hangs, self._given = toy_loader(), numbers, hangs, 0
        self.get_state, self.set_state = self._loader.get_state, self._loader.set_state

    def __iter__(self):
        return self

    def __next__(self):
        self._given += 1
        if self._given == 4:
            for number in self._numbers:
                signal.raise_signal(number)
            if self._hangs:
                threading.Event().wait(120)
                pytest.fail("nothing has broken the wait off")
        return next(self._loader)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, quickly):
    workdir = tmp_path_factory.mktemp("straight")
    train_toy(workdir)
    return without_times(read_records(workdir))


def checkpoints(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_run_whose_data_does_not_come_is_saved(
    straight, tmp_path, monkeypatch, caplog, number, code
):
    caplog.set_level("INFO", "mvjax")
    monkeypatch.setattr(preemption, "GRACE", 0.1)
    before = signal.getsignal(number)
    config = toy_config(checkpoint_every=100)
    with pytest.raises(SystemExit) as stopped:
        train_toy(tmp_path, config, loader=Signalling(number, hangs=True))
    assert stopped.value.code == code and signal.getsignal(number) is before
    # Two batches are in transfer beyond the one trained on, so the fourth is read before step 2.
    assert checkpoints(tmp_path) == ["1"] and "stopping at step 1, saved: no data" in caplog.text
    train_toy(tmp_path, config)
    assert without_times(read_records(tmp_path)) == straight


def test_a_run_that_is_broken_off_before_its_first_step_has_nothing_to_save(tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "GRACE", 0.1)
    loader = Signalling(signal.SIGTERM, hangs=True)
    loader._given = 3
    with pytest.raises(SystemExit) as stopped:
        train_toy(tmp_path, loader=loader)
    assert stopped.value.code == 0 and checkpoints(tmp_path) == []


def test_a_second_sigterm_loses_nothing(straight, tmp_path, monkeypatch):
    """Neither before the step is made, nor while the checkpoint is written."""
    wait = Store.__exit__

    def interrupted(store, *exception):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        wait(store, *exception)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Store, "__exit__", interrupted)
    config = toy_config(checkpoint_every=100)
    loader = Signalling(signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train_toy(tmp_path, config, loader=loader)
    assert stopped.value.code == 0 and checkpoints(tmp_path) == ["2"]
    monkeypatch.undo()
    train_toy(tmp_path, config)
    assert without_times(read_records(tmp_path)) == straight


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    config = toy_config(checkpoint_every=100)
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path, config, loader=Signalling(signal.SIGINT, signal.SIGINT))
    assert checkpoints(tmp_path) == []


def test_a_run_that_is_to_stop_does_not_wait_for_a_validation(tmp_path):
    def validation(step, params):
        pytest.fail("there is no time for it")

    config = toy_config(sample_every=2, checkpoint_every=100)
    with pytest.raises(SystemExit):
        train_toy(tmp_path, config, loader=Signalling(signal.SIGTERM), validation=validation)
    assert checkpoints(tmp_path) == ["2"]
