import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from toy_training import toy_config, toy_loader, toy_stage, train_toy

from mvjax.models.network import merge
from mvjax.parallel import make_mesh, make_rules
from mvjax.training import damage
from mvjax.training.checkpoint import Store, checkpoint_folder
from mvjax.training.damage import CheckpointDeleted, CheckpointMismatch
from mvjax.training.directory import abstract_params, read_meta, restore_params
from mvjax.training.step import abstract_state, make_optimizer


def toy_abstract(stage=None, ema=True):
    optimizer = make_optimizer(toy_config().optimizer)
    return abstract_state(
        stage or toy_stage(), optimizer, ema, make_mesh({"data": -1}), make_rules()
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    train_toy(workdir, meta={"data_fingerprint": "abc"})
    return workdir


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def test_state_position_and_meta_come_back(trained):
    with Store(trained, keep=2) as store:
        restored = store.restore(toy_abstract())
    assert int(restored.state.step) == 4
    assert restored.meta["data_fingerprint"] == "abc"
    assert restored.meta["config"]["training"]["steps"] == 4
    assert "jax" in restored.meta["versions"]
    # The position is that of the fourth batch, although the loader has read further.
    reader = toy_loader()
    for _ in range(4):
        next(reader)
    expected = next(reader)["index"]
    fresh = toy_loader()
    fresh.set_state(restored.position)
    np.testing.assert_array_equal(next(fresh)["index"], expected)
    # Optimizer moments and averages exist for trainable leaves only.
    sizes = {leaf.shape for leaf in jax.tree.leaves(restored.state.opt_state)}
    assert toy_stage().trainable(("up", "bias")) and (32,) in sizes and (3, 16) not in sizes
    assert set(restored.state.ema) == {"up", "down"}


def test_positions_given_as_bytes_come_back_as_bytes(tmp_path):
    abstract = toy_abstract()
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    with Store(tmp_path, keep=1) as store:
        store.save(1, state, b'{"next": 7}', {})
    with Store(tmp_path, keep=1) as store:
        assert store.restore(abstract).position == b'{"next": 7}'


def test_a_damaged_checkpoint_is_named_with_a_remedy(copied):
    """Stage 2 and the policy do not go back a step by themselves: they would be another model."""
    newest = checkpoint_folder(copied) / "4"
    sound = (newest / "meta" / "metadata").read_text()
    for path, content in (("meta/metadata", sound[:9]), ("state/_METADATA", "{")):
        (newest / path).write_text(content)
        with pytest.raises(OSError, match=r"checkpoints/4 cannot be read \(JSON.*move it away"):
            read_meta(copied) and abstract_params(copied)
        (newest / "meta" / "metadata").write_text(sound)
    newest.rename(copied / "away")
    assert read_meta(copied)["data_fingerprint"] == "abc" and abstract_params(copied)


@pytest.mark.parametrize(("keep_every", "left"), [(0, ["5", "6"]), (3, ["3", "5", "6"])])
def test_the_newest_checkpoints_and_those_of_keep_every_stay(tmp_path, keep_every, left):
    config = toy_config(steps=5, checkpoint_every=1, keep_every=keep_every)
    train_toy(tmp_path, config)
    config.training.steps = 6  # also when the run was interrupted between
    train_toy(tmp_path, config)
    assert sorted(path.name for path in checkpoint_folder(tmp_path).iterdir()) == left


def test_positions_of_earlier_versions_one_file_per_process_are_read(copied):
    with Store(copied, keep=2) as store:
        position = store.restore(toy_abstract()).position
        folder = store.folder / "4" / "data"
        shutil.rmtree(folder)
        folder.mkdir()
        for index in range(2):
            text = json.dumps({"json": position})
            (folder / f"process_{index}-of-2.json").write_text(text)
        assert position and store.restore(toy_abstract()).position == position


def test_an_empty_directory_restores_nothing(tmp_path):
    with Store(tmp_path, keep=1) as store:
        assert store.latest_step() is None and store.restore(toy_abstract()) is None


def test_wrong_width_is_one_sentence_with_both_shapes(trained):
    with Store(trained, keep=2) as store:
        with pytest.raises(
            CheckpointMismatch, match=r"params/down/kernel has .*\(32, 3\).*\(48, 3\)"
        ):
            store.restore(toy_abstract(toy_stage(width=24)))


def test_missing_and_extra_leaves_are_named(trained):
    with Store(trained, keep=2) as store:
        with pytest.raises(CheckpointMismatch, match="this configuration lacks: ema/down"):
            store.restore(toy_abstract(ema=False))
    params = toy_abstract().params
    larger = merge(params, {"head": {"kernel": params["embed"]["kernel"]}})
    with pytest.raises(CheckpointMismatch, match="the checkpoint lacks: head/kernel"):
        restore_params(trained, larger)
    with pytest.raises(CheckpointMismatch, match="this configuration lacks: up/bias, up/kernel"):
        restore_params(trained, {name: params[name] for name in ("embed", "down")})


@pytest.mark.parametrize("damage", ["arrays cut short", "metadata gone", "position gone"])
def test_a_damaged_newest_checkpoint_is_set_aside(copied, damage):
    newest = checkpoint_folder(copied) / "4"
    if damage == "arrays cut short":
        for path in newest.glob("state/**/d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "metadata gone":
        (newest / "state" / "_METADATA").unlink()
    else:
        shutil.rmtree(newest / "data")
    with Store(copied, keep=2) as store:
        with pytest.warns(UserWarning, match="checkpoint 4 .* cannot be read"):
            restored = store.restore(toy_abstract())
        assert int(restored.state.step) == 2 and store.latest_step() == 2
    # The run goes on and writes step 4 again.
    records = train_toy(copied, meta={"data_fingerprint": "abc"})
    assert records["step"] == 4


def test_arrays_of_another_checkpoint_are_damage(copied):
    """The files are whole, but a bit, or a copy, has made them others than were saved."""
    folder = checkpoint_folder(copied)
    shutil.rmtree(folder / "4" / "state")
    shutil.copytree(folder / "2" / "state", folder / "4" / "state")
    with Store(copied, keep=2) as store:
        with pytest.warns(UserWarning, match=r"damaged_4 .*has the digest \w+, but \w+ was saved"):
            restored = store.restore(toy_abstract())
        assert int(restored.state.step) == 2


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def told(number: int, status: str) -> ValueError:
    """An error of the system as tensorstore tells it."""
    return ValueError(f"{status}: Error reading: {os.strerror(number)} [os_error_code='{number}']")


def hidden(reason: Exception) -> Exception:
    """As Orbax raises it."""
    outer = Exception("Encountered error while reading array index")
    outer.__cause__ = reason
    return outer


@pytest.fixture
def failing(monkeypatch):
    """failing(error, times): the next readings of arrays fail."""
    monkeypatch.setattr(damage, "PAUSES", (0.0, 0.0, 0.0))
    read, left = ocp.PyTreeCheckpointHandler.restore, []

    def restore(*arguments, **named):
        if left:
            raise left.pop()
        return read(*arguments, **named)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore)
    return lambda error, times: left.extend([error] * times)


@pytest.mark.parametrize(
    "reason",
    [
        error(errno.ESTALE),
        error(errno.EIO),
        TimeoutError(errno.ETIMEDOUT, "timed out"),
        told(errno.EIO, "UNKNOWN"),
        hidden(told(errno.ESTALE, "ABORTED")),
        ValueError("UNAVAILABLE: the service is down"),
    ],
    ids=str,
)
def test_what_may_pass_is_waited_for_and_damages_nothing(copied, failing, reason, caplog):
    folder = checkpoint_folder(copied)
    with Store(copied, keep=2) as store:
        failing(reason, 2)
        assert int(store.restore(toy_abstract()).state.step) == 4
        assert caplog.text.count("trying again in") == 2
        failing(reason, 4)
        with pytest.raises(OSError, match=r"checkpoints/4 cannot be read .*nothing shows that"):
            store.restore(toy_abstract())
        failing(reason, 4)
        with pytest.raises(OSError, match=r"checkpoints/4 cannot be read .*nothing shows that"):
            restore_params(copied, toy_abstract().params)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]


@pytest.mark.parametrize(
    "reason",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        told(errno.EACCES, "PERMISSION_DENIED"),
        error(errno.EMFILE),
        error(errno.ENOSPC),
        MemoryError("out of memory"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory on the device"),
        ImportError("No module named 'zstandard'"),
        KeyError("a field of a newer version"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_what_proves_no_damage_stops_and_renames_nothing(copied, failing, reason):
    """Another attempt would not help, but the files may be as they were."""
    folder = checkpoint_folder(copied)
    with Store(copied, keep=2) as store:
        failing(reason, 1)
        with pytest.raises((OSError, type(reason))) as stopped:
            store.restore(toy_abstract())
        assert "move it away" not in str(stopped.value)
        assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]
        assert int(store.restore(toy_abstract()).state.step) == 4


def test_a_checkpoint_deleted_while_it_is_read_is_not_called_damaged(copied, monkeypatch):
    """As by a training with keep=1, at once or file by file."""
    monkeypatch.setattr(damage, "PAUSES", (0.1,))
    folder, wanted = checkpoint_folder(copied), toy_abstract().params
    read = ocp.PyTreeCheckpointHandler.restore

    def files():
        return [path for path in (folder / "2").rglob("*") if path.is_file()]

    def slowly():
        while files():
            files()[0].unlink()
            time.sleep(0.05)
        shutil.rmtree(folder / "2")

    def overtaken(*arguments, **named):
        if not threads:
            for path in (folder / "2" / "state").rglob("d/*"):
                path.unlink()
            threads.append(threading.Thread(target=slowly))
            threads[0].start()
        return read(*arguments, **named)

    threads = []
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", overtaken)
    with pytest.raises(CheckpointDeleted, match=r"deleted while .*the newest is now 4: run the"):
        restore_params(copied, wanted, step=2)
    threads[0].join()


def test_when_no_checkpoint_can_be_read_nothing_is_moved(copied):
    folder = checkpoint_folder(copied)
    for step in (2, 4):
        (folder / str(step) / "state" / "_METADATA").unlink()
    with Store(copied, keep=2) as store:
        with pytest.raises(OSError, match=r"none of the checkpoints \[4, 2\]"):
            store.restore(toy_abstract())
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]


def test_a_half_written_checkpoint_is_not_seen(copied):
    folder = checkpoint_folder(copied)
    shutil.copytree(folder / "4", folder / "6.orbax-checkpoint-tmp")
    (folder / "6.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    assert read_meta(copied)["stage"] == "toy"
    with Store(copied, keep=2) as store:
        assert store.latest_step() == 4


def test_bridge_reads_averages_or_raw_parameters_in_the_wanted_dtype(trained):
    with Store(trained, keep=2) as store:
        state = store.restore(toy_abstract()).state
    wanted = toy_abstract().params
    raw = restore_params(trained, wanted, use_ema=False)
    jax.tree.map(np.testing.assert_array_equal, raw, state.params)
    averaged = restore_params(trained, wanted)
    jax.tree.map(np.testing.assert_array_equal, averaged, merge(state.params, state.ema))
    assert not np.array_equal(raw["up"]["kernel"], averaged["up"]["kernel"])
    half = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding), wanted
    )
    assert restore_params(trained, half, step=2)["up"]["kernel"].dtype == jnp.bfloat16
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(trained))
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, wanted)


def test_bridge_names_missing_directories_and_steps(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a training directory"):
        read_meta(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 3; it has the steps \[2, 4\]"):
        read_meta(trained, step=3)
