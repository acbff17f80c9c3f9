import errno
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import forked
import jax
import numpy as np
import optax
import pytest
from run_records import without_times
from toy_training import toy_config, toy_loader, toy_stage, train_toy

from data_pipelines.lock import run_lock
from mvjax.parallel import make_mesh, make_rules
from mvjax.training.checkpoint import Store
from mvjax.training.damage import CheckpointMismatch
from mvjax.training.directory import abstract_params, restore_params
from mvjax.training.metrics import read_records
from mvjax.training.step import abstract_state, make_optimizer
from mvjax.training.train import TrainingDiverged, _say_end_of_schedule

pytestmark = pytest.mark.usefixtures("quickly")


def params_of(workdir, use_ema=False, step=None):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        abstract_params(workdir),
    )
    return jax.tree.map(np.asarray, restore_params(workdir, wanted, use_ema=use_ema, step=step))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, quickly) -> Path:
    workdir = tmp_path_factory.mktemp("straight")
    train_toy(workdir)
    return workdir


def test_two_steps_and_a_resume_equal_four_steps(straight, tmp_path):
    train_toy(tmp_path, toy_config(steps=2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # as if it had been killed while it wrote
    final = train_toy(tmp_path)
    records = read_records(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert without_times(records) == without_times(read_records(straight))
    assert final == records[-1]
    for use_ema in (False, True):
        jax.tree.map(
            np.testing.assert_array_equal,
            params_of(tmp_path, use_ema),
            params_of(straight, use_ema),
        )


def test_data_order_is_that_of_the_loader(straight):
    loader = toy_loader()
    expected = [float(next(loader)["index"][0]) for _ in range(4)]
    assert [record["first_sample"] for record in read_records(straight)] == expected


def test_frozen_leaf_does_not_move_and_the_others_do(straight):
    params = params_of(straight)
    key = jax.random.fold_in(jax.random.key(3), 2**32 - 1)
    start = jax.jit(toy_stage().init)(key)
    np.testing.assert_array_equal(params["embed"]["kernel"], start["embed"]["kernel"])
    assert not np.array_equal(params["up"]["kernel"], start["up"]["kernel"])


def test_average_follows_its_recurrence(straight, tmp_path):
    """ema <- d ema + (1 - d) params with d = min(decay, (1 + n) / (10 + n))."""
    key = jax.random.fold_in(jax.random.key(3), 2**32 - 1)
    average = np.asarray(jax.jit(toy_stage().init)(key)["up"]["kernel"])
    train_toy(tmp_path, toy_config(steps=3, checkpoint_every=1, keep=3))
    for n in range(3):
        decay = min(0.9, (1 + n) / (10 + n))
        kernel = params_of(tmp_path, step=n + 1)["up"]["kernel"]
        average = decay * average + (1 - decay) * kernel
    np.testing.assert_allclose(
        params_of(tmp_path, use_ema=True)["up"]["kernel"], average, rtol=1e-5
    )


def test_a_finished_run_returns_its_record_without_reading_data(straight):
    def forbidden():
        raise AssertionError("the loader was read")
        yield

    final = train_toy(straight, loader=forbidden())
    assert final == read_records(straight)[-1] and final["step"] == 4


def test_init_from_takes_the_averaged_parameters_and_starts_at_step_one(straight, tmp_path):
    config = toy_config(steps=1)
    config.init_from = str(straight)
    config.optimizer.learning_rate = 0.0
    assert train_toy(tmp_path, config)["step"] == 1
    jax.tree.map(
        np.testing.assert_array_equal, params_of(tmp_path), params_of(straight, use_ema=True)
    )


def test_init_from_a_run_without_adapters_adds_new_ones(straight, tmp_path):
    config = toy_config(steps=1)
    config.init_from, config.optimizer.learning_rate = str(straight), 0.0
    train_toy(tmp_path, config, stage=toy_stage(adapters=True))
    params = params_of(tmp_path)
    assert np.any(params.pop("adapter")["lora_a"])
    jax.tree.map(np.testing.assert_array_equal, params, params_of(straight, use_ema=True))
    with pytest.raises(CheckpointMismatch, match=r"down/kernel has shape \(32, 3\).*\(48, 3\)"):
        train_toy(tmp_path / "other", config, stage=toy_stage(width=24))


class Interrupting:
    """The toy loader, with a signal to this process while it gives the fourth batch."""

    def __init__(self, number: int):
        self._loader, self._number, self._given = toy_loader(), number, 0

    def __iter__(self):
        return self

    def __next__(self):
        self._given += 1
        if self._given == 4:
            signal.raise_signal(self._number)
        return next(self._loader)

    def get_state(self):
        return self._loader.get_state()

    def set_state(self, state):
        self._loader.set_state(state)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_reached_and_the_rest_is_the_same(
    straight, tmp_path, caplog, number, code
):
    caplog.set_level("INFO", "mvjax")
    before = signal.getsignal(number)
    config = toy_config(checkpoint_every=100)
    with pytest.raises(SystemExit) as stopped:
        train_toy(tmp_path, config, loader=Interrupting(number))
    assert stopped.value.code == code and signal.getsignal(number) is before
    # Two batches are in transfer beyond the one trained on, so the fourth is read before step 2.
    assert "stopping at step 2, saved; run the same command" in caplog.text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    train_toy(tmp_path, config)
    assert without_times(read_records(tmp_path)) == without_times(read_records(straight))


def test_eight_devices_equal_one_and_exchange_checkpoints(straight, tmp_path):
    said = forked.run("toy_training", tmp_path, 2, "data=1", "fsdp=4", "context=2", devices=8)
    assert said.code == 0, said.err
    metadata = (tmp_path / "checkpoints" / "2" / "state" / "_sharding").read_text()
    assert "fsdp" in metadata  # the arrays were split, not copied
    # The rest on this process's mesh, from the checkpoint of the other mesh.
    train_toy(tmp_path, meta={"data_fingerprint": "toy"})
    for ours, theirs in zip(
        without_times(read_records(straight)), without_times(read_records(tmp_path))
    ):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=1e-5, abs=1e-8), name
    for ours, theirs in zip(*(jax.tree.leaves(params_of(w)) for w in (straight, tmp_path))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_other_data_is_refused_and_changed_settings_are_logged(straight, tmp_path, caplog):
    caplog.set_level("INFO", "mvjax")
    train_toy(tmp_path, toy_config(steps=1), meta={"data_fingerprint": "a"})
    with pytest.raises(CheckpointMismatch, match="fingerprint a, but the data now has b"):
        train_toy(tmp_path, meta={"data_fingerprint": "b"})
    config = toy_config()
    config.optimizer.weight_decay = 0.0
    train_toy(tmp_path, config, meta={"data_fingerprint": "a"})
    assert "optimizer.weight_decay is 0.1 there, 0.0 here" in caplog.text


@pytest.mark.parametrize(("setting", "value"), [("batch_size", 16), ("batch_size", 4), ("seed", 4)])
def test_a_position_in_batches_does_not_fit_other_batches(straight, tmp_path, setting, value):
    """As checkpoints of earlier versions store it; the loader's own position counts samples."""
    shutil.copytree(straight, tmp_path / "copy")
    config = toy_config(steps=6, **{setting: value})
    loader = toy_loader(config.training.batch_size)
    with pytest.raises(CheckpointMismatch, match=f"training.{setting} is . there, {value} here"):
        train_toy(tmp_path / "copy", config, loader=loader)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, {"optimizer.clip_norm": 0.0}, "optimizer.clip_norm is 1.0 there, 0.0 here"),
        ({"optimizer.clip_norm": 0.0}, {}, "optimizer.clip_norm is 0.0 there, 1.0 here"),
        ({}, {"training.ema_decay": 0.0}, "the moving average of before is left out"),
        ({"training.ema_decay": 0.0}, {}, "a moving average begins with these parameters"),
        ({}, {"optimizer.mu_dtype": "bfloat16"}, "optimizer.mu_dtype is '' there"),
        ({"optimizer.mu_dtype": "bfloat16"}, {}, "optimizer.mu_dtype is 'bfloat16' there"),
        ({}, {"optimizer.schedule": "constant"}, "optimizer.schedule is 'cosine' there"),
        ({}, {"optimizer.weight_decay": 0.0}, "optimizer.weight_decay is 0.1 there"),
        ({}, {"training.accumulate": 2}, "training.accumulate is 1 there"),
    ],
)
def test_settings_of_the_optimizer_may_change_on_resume(tmp_path, caplog, before, after, said):
    caplog.set_level("INFO", "mvjax")

    def go(steps, settings):
        config = toy_config(steps=steps)
        config.update_from_flattened_dict(settings)
        train_toy(tmp_path, config)
        return config

    go(2, before)
    config = go(4, after)
    assert said in caplog.text and "opt_state" not in caplog.text
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3, 4]
    # The moments of the first two steps are those of the optimizer now.
    abstract = abstract_state(
        toy_stage(),
        make_optimizer(config.optimizer),
        config.training.ema_decay > 0,
        make_mesh({"data": -1}),
        make_rules(),
    )
    with Store(tmp_path, keep=2) as store:
        adam = store.restore(abstract).state.opt_state.inner[1]
    assert int(adam.count) == 4
    assert bool(params_of(tmp_path, use_ema=True))


def test_a_run_that_is_longer_than_its_schedule_says_so(caplog):
    """As one that is continued with training.steps alone."""
    caplog.set_level("INFO", "mvjax")
    optimizer = toy_config().optimizer
    _say_end_of_schedule(optimizer, optimizer.decay_steps)
    assert not caplog.text
    _say_end_of_schedule(optimizer, 60)
    assert "after step 50 the learning rate stays at 0.001." in caplog.text
    optimizer.final_fraction = 0.0
    _say_end_of_schedule(optimizer, 60)
    assert "stays at 0, and nothing is learned." in caplog.text


def test_an_average_that_is_begun_on_resume_begins_with_the_parameters(tmp_path):
    train_toy(tmp_path, toy_config(steps=2, ema_decay=0.0))
    start = params_of(tmp_path)["up"]["kernel"]
    config = toy_config(steps=3, checkpoint_every=1)
    train_toy(tmp_path, config)
    decay, now = min(0.9, 3 / 12), params_of(tmp_path)["up"]["kernel"]
    average = params_of(tmp_path, use_ema=True)["up"]["kernel"]
    np.testing.assert_allclose(average, decay * start + (1 - decay) * now, rtol=1e-5)


def test_a_run_of_an_earlier_version_without_clipping_goes_on(tmp_path, monkeypatch):
    """Its optimizer had no place for the clipping, which moved all others."""

    def go(workdir, steps):
        config = toy_config(steps=steps)
        config.optimizer.clip_norm = 0.0
        return train_toy(workdir, config)

    go(tmp_path / "straight", 4)
    chain = optax.chain
    with monkeypatch.context() as patch:
        patch.setattr(optax, "chain", lambda first, *rest: chain(*rest))
        go(tmp_path / "run", 2)
    go(tmp_path / "run", 4)
    expected = without_times(read_records(tmp_path / "straight"))
    assert without_times(read_records(tmp_path / "run")) == expected


def test_other_networks_of_equal_widths_are_refused_on_resume(tmp_path):
    def go(steps, **settings):
        config = toy_config(steps=steps)
        config.context_layer, config.policy_io = 3, dict(action=dict(shift=0.0))
        config.update_from_flattened_dict(settings)
        return train_toy(tmp_path, config)

    go(2)
    for setting, value in (("context_layer", 2), ("policy_io.action.shift", 0.2)):
        with pytest.raises(CheckpointMismatch, match=f"{setting} is .* there, {value} here"):
            go(4, **{setting: value})
    assert go(4)["step"] == 4


def test_a_checkpoint_that_cannot_be_written_once_ends_no_run(tmp_path, monkeypatch, caplog):
    """Its place takes the next one; the last one is tried again."""
    caplog.set_level("INFO", "mvjax")
    monkeypatch.setattr("mvjax.training.train.SAVING_PAUSES", (0.0,))
    save, fails = Store.save, {2, 6}

    def failing(store, step, *arguments):
        if step in fails:
            fails.remove(step)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(store, step, *arguments)

    monkeypatch.setattr(Store, "save", failing)
    assert train_toy(tmp_path, toy_config(steps=6))["step"] == 6
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    assert "step 2 cannot be saved ([Errno 28]" in caplog.text
    fails |= {2, 4}
    with pytest.raises(OSError, match="No space left"):
        train_toy(tmp_path / "twice", toy_config(steps=6))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_write_that_fails_in_the_background_ends_no_run_unless_it_fails_again(
    tmp_path, monkeypatch, caplog
):
    """Tensorstore tells of a full quota with a ValueError, when the next checkpoint is due."""
    save, fails = Store.save, {2}
    infinite = resource.RLIM_INFINITY

    def limited(store, step, *arguments):
        while store._manager.is_saving_in_progress():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000 if step in fails else infinite, infinite))
        save(store, step, *arguments)

    monkeypatch.setattr(Store, "save", limited)
    config, stage = toy_config(steps=6), toy_stage(width=200)
    try:
        train_toy(tmp_path, config, stage=stage)
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
        assert "could not be written" in caplog.text and "step 4 is saved" in caplog.text
        fails |= {2, 4}
        with pytest.raises(OSError, match="File too large"):
            train_toy(tmp_path / "twice", toy_config(steps=8), stage=stage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (infinite, infinite))


def test_a_finished_run_with_other_settings_is_not_trained_again(tmp_path, caplog):
    caplog.set_level("INFO", "mvjax")

    def again(**changes):
        config = toy_config(steps=2)
        config.video_model = dict(width=16, precision="float32")
        config.update_from_flattened_dict(changes)
        caplog.clear()
        record = train_toy(tmp_path, config, meta={"data_fingerprint": "a"})
        assert record["step"] == 2
        return caplog.text

    again()
    assert "already trained to step 2.\n" in again()
    compute = {"video_model.precision": "bfloat16", "training.log_every": 2, "training.keep": 1}
    assert "already trained to step 2.\n" in again(**compute)
    said = again(**{"optimizer.learning_rate": 0.5})
    assert "already trained to step 2, with other settings" in said
    assert "(optimizer.learning_rate is 0.01 there, 0.5 here)" in said
    with pytest.raises(CheckpointMismatch, match=r"video_model.width is 16 there, 32 here"):
        again(**{"video_model.width": 32})
    with pytest.raises(CheckpointMismatch, match="fingerprint a, but the data now has None"):
        train_toy(tmp_path, toy_config(steps=2))


def test_a_finished_run_whose_newest_checkpoint_is_damaged_repeats_those_steps(tmp_path):
    train_toy(tmp_path)
    (tmp_path / "checkpoints" / "4" / "meta" / "metadata").unlink()
    before = read_records(tmp_path)
    with pytest.warns(UserWarning, match="checkpoint 4 .* cannot be read"):
        train_toy(tmp_path)
    assert without_times(read_records(tmp_path)) == without_times(before)
    assert (tmp_path / "checkpoints" / "damaged_4").is_dir()


def test_only_a_run_that_made_its_last_step_is_marked_as_finished(tmp_path):
    finished = tmp_path / "finished"
    config = toy_config(checkpoint_every=100)
    with pytest.raises(SystemExit) as stopped:
        train_toy(tmp_path, config, loader=Interrupting(signal.SIGTERM))
    assert stopped.value.code == 0 and not finished.exists()
    train_toy(tmp_path)
    assert finished.read_text() == "4\n"
    finished.unlink()  # as if the process had been killed after the last checkpoint
    train_toy(tmp_path)
    assert finished.exists()
    with pytest.raises(SystemExit):  # a longer run is not finished again
        train_toy(tmp_path, toy_config(steps=40), loader=Interrupting(signal.SIGTERM))
    assert not finished.exists()


@pytest.mark.parametrize("steps", [2, 8])
def test_a_profile_has_its_steps(tmp_path, steps):
    train_toy(tmp_path, toy_config(steps=steps), profile=True)
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    content = trace.read_bytes()
    assert b"train" in content and b"step_num" in content
    assert read_records(tmp_path)[-1]["step"] == steps


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    with run_lock(tmp_path), pytest.raises(OSError, match=r"process .* is writing to"):
        train_toy(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_run_stops_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("mvjax.training.train.MAX_SKIPPED_IN_A_ROW", 3)
    with pytest.raises(TrainingDiverged, match="not finite for 3 steps"):
        train_toy(tmp_path, toy_config(steps=9), stage=toy_stage(scale=float("inf")))
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"] is None


@pytest.mark.parametrize("repeat, entry, message", [(1, None, "must repeat"), (None, "x", "'x'")])
def test_a_loader_that_ends_or_lacks_an_entry_is_refused(tmp_path, repeat, entry, message):
    stage = toy_stage()
    if entry:
        stage.batch_axes[entry] = ("batch",)
    with pytest.raises(ValueError, match=message):
        train_toy(tmp_path, toy_config(steps=40), stage=stage, loader=toy_loader(repeat=repeat))
