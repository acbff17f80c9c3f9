"""What a run writes down about itself."""

import json
import shutil
import sys
import time

import jax
import numpy as np
import pytest
from tiny_stages import build_stage, tiny_config, tiny_loader
from toy_training import toy_config, train_toy

from data_pipelines.clip import Clip
from mvjax.experiment import Experiment
from mvjax.models.flops import step_flops
from mvjax.training import metrics
from mvjax.training.metrics import MetricsWriter, _wandb_id, read_records
from mvjax.training.objectives import error_by_level, named_levels
from mvjax.training.run import run
from mvjax.training.train import train

pytestmark = pytest.mark.usefixtures("quickly")


def test_errors_are_averaged_by_noise_level_over_steps():
    error = np.array([1.0, 3.0, np.nan, 5.0, 7.0, 9.0], np.float32)
    level = np.array([0.1, 0.19, 0.5, 0.8, 0.999, 1.0], np.float32)
    named = named_levels([error_by_level(error, level), error_by_level(error[:1], level[:1])])
    assert named["samples/tau_0.0_0.2"] == 3
    assert named["velocity_mse/tau_0.0_0.2"] == pytest.approx(5 / 3)
    assert named["samples/tau_0.2_0.4"] == 0 and "velocity_mse/tau_0.2_0.4" not in named
    assert np.isnan(named["velocity_mse/tau_0.4_0.6"])  # and no other bin
    assert named["velocity_mse/tau_0.8_1.0"] == 7 and named["samples/tau_0.8_1.0"] == 3
    assert named_levels([]) == {}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A stage-1 run on devices whose peak is said to be 1 TFLOP/s."""
    workdir, config = tmp_path_factory.mktemp("run"), tiny_config("video", steps=7)
    config.training.log_every = 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "peak_flops", lambda device: 1e12)
        train(Experiment.from_config(config), build_stage(config)[0], tiny_loader(config), workdir)
    return config, workdir, read_records(workdir)


def test_a_record_has_speed_utilisation_and_memory(records):
    config, _, rows = records
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert rows[0]["compile_seconds"] > 0 and "compile_seconds" not in rows[1]
    for row in rows:
        spent = row["data_seconds"] + row["step_seconds"]
        assert 0 < row["seconds_per_step"] <= spent
        per_second = row["samples_per_second"]
        assert per_second == pytest.approx(config.training.batch_size / row["seconds_per_step"])
        tokens = Clip(**config.clip).tokens
        assert row["tokens_per_second"] == pytest.approx(tokens * per_second)
        devices = len(jax.devices())
        assert row["mfu"] == pytest.approx(
            per_second * step_flops(Experiment.from_config(config)) / 1e12 / devices
        )
        assert row["host_mb"] > 100 or row["device_peak_mb"] > 1
    # Two steps are finished when the third is recorded, and all seven at the end.
    finished = [(r["data_seconds"] + r["step_seconds"]) / r["seconds_per_step"] for r in rows]
    assert finished == pytest.approx([2, 3, 2])


def test_every_step_since_the_last_record_counts_in_the_levels(records):
    config, _, rows = records
    for row, steps in zip(rows, (3, 3, 1)):
        counts = {k: v for k, v in row.items() if k.startswith("samples/")}
        assert len(counts) == 5 and sum(counts.values()) == steps * config.training.batch_size
        means = [name for name in row if name.startswith("velocity_mse/")]
        assert len(means) == sum(count > 0 for count in counts.values())
    row = rows[-1]  # of one step: its mean is that of the bins
    mean = sum(row[f"velocity_mse/{k[8:]}"] * v for k, v in counts.items() if v) / 8
    assert mean == pytest.approx(row["velocity_mse"], rel=1e-5)


def test_tensorboard_has_the_same_numbers(records):
    _, workdir, _ = records
    (events,) = (workdir / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in ("loss", "mfu", "velocity_mse/tau_0.8_1.0", "grad_norm", "update_norm"):
        assert name.encode() in content, name


def test_the_progress_line_shows_loss_and_speed(tmp_path, capsys):
    config = toy_config(steps=6, log_every=2, checkpoint_every=9)
    train_toy(tmp_path, config)
    line = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert "6/6" in line and "loss " in line and " s/step" in line, line


def test_no_speed_is_recorded_before_a_step_is_finished(tmp_path):
    train_toy(tmp_path / "one", toy_config(steps=1, log_every=1))
    assert "seconds_per_step" in read_records(tmp_path / "one")[0]  # saving waited for it
    train_toy(tmp_path / "more", toy_config(checkpoint_every=9))
    first, second = read_records(tmp_path / "more")[:2]
    assert "seconds_per_step" not in first and second["seconds_per_step"] > 0
    assert "mfu" not in second and "tokens_per_second" not in second  # the toy tells neither


def test_wandb_runs_are_continued(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    picture = {"samples/0": np.zeros((8, 8, 3), np.uint8)}
    for first in (0, 2):  # started, and continued
        writer = MetricsWriter(tmp_path, first, "a_project", json.loads(toy_config().to_json()))
        writer.log(first + 1, {"loss": np.float32(1)}, [], {"seconds_per_step": 2.0})
        writer.show(first + 1, picture)
        writer.close()
        time.sleep(1.1)  # wandb names a run's folder by the second
    runs = [p for p in (tmp_path / "wandb").iterdir() if p.name.startswith("offline-run")]
    number = (tmp_path / "wandb_id").read_text().splitlines()[0]
    assert len(runs) == 2 and all(number in run.name for run in runs) and wandb.run is None


def test_a_copied_run_is_another_one_at_wandb_and_a_moved_one_is_not(tmp_path):
    first, copy, moved = (tmp_path / name for name in ("first", "copy", "moved"))
    first.mkdir()
    id = _wandb_id(first / "wandb_id")
    shutil.copytree(first, copy)
    other = _wandb_id(copy / "wandb_id")
    assert other != id and other == _wandb_id(copy / "wandb_id")
    first.rename(moved)
    assert _wandb_id(moved / "wandb_id") == id
    shutil.copytree(moved, first)  # a copy, although it lies where the run began
    assert _wandb_id(first / "wandb_id") != id == _wandb_id(moved / "wandb_id")
    (moved / "wandb_id").write_text("of an earlier version")
    assert _wandb_id(moved / "wandb_id") == "of an earlier version"


def test_wandb_that_is_not_installed_is_explained_before_any_data_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not
    config = tiny_config("video")
    config.wandb = "a_project"
    with pytest.raises(ValueError, match="not installed: pip install wandb"):
        run(Experiment.from_config(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()
