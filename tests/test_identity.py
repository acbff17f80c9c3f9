"""What a result is a result of: digests, the identity of a policy, and folders of one identity.

python tests/test_identity.py prints the digest of `tree` spread over all devices.
"""

import errno
import json
import os
import shutil
import threading

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_lora import stored
from tiny_policy import run_config, save_run
from tiny_stages import five_steps, save_untrained, tiny_config

from data_pipelines.settings import differences
from mvjax import identity
from mvjax.experiment import Experiment
from mvjax.identity import claim, digest, digest_of_json, digest_of_sums, piece_sums, read_identity
from mvjax.policy import load
from mvjax.policy.load import load_policy
from mvjax.training import damage
from mvjax.training.bridge import (
    backbone_checkpoint,
    backbone_identity,
    load_backbone,
    trained_backbone,
)
from mvjax.training.checkpoint import leaf_paths
from mvjax.training.damage import CheckpointMismatch
from mvjax.training.directory import find_checkpoint, stored_digest

pytestmark = pytest.mark.usefixtures("quickly")


def tree():
    rng = np.random.default_rng(0)
    return {
        "a/kernel": rng.normal(size=(4, 8, 16)).astype(np.float32),
        "a/bias": rng.normal(size=(16,)).astype("bfloat16"),
        "scale": np.float32(2).reshape(()),
        "none": np.zeros((0, 3), np.float32),
        "b/kernel": rng.normal(size=(4, 8, 16)).astype(np.float32),
    }


DIGEST = "8cc97675b8f78001"  # stored in checkpoints and results: it must never change


# Digests.


def test_a_digest_is_of_the_numbers_and_not_of_where_they_lie(monkeypatch):
    assert digest(tree()) == digest(jax.device_put(tree())) == DIGEST
    assert forked.run("test_identity", devices=8).out.split() == [DIGEST]
    monkeypatch.setattr(identity, "_SMALL", -1)  # as large leaves are summed
    monkeypatch.setattr(identity, "_on_host", lambda leaf: False)  # on an accelerator
    assert digest(jax.device_put(tree())) == DIGEST


@pytest.mark.parametrize("part", [1 << 16, 7])
def test_a_leaf_may_be_summed_in_pieces(monkeypatch, part):
    monkeypatch.setattr(identity, "_PART", part)
    leaves = {}
    for name, leaf in tree().items():
        pieces = leaf if leaf.ndim == 3 else [leaf]
        sums = [piece_sums(p, n * p.size).astype(np.uint64) for n, p in enumerate(pieces)]
        leaves[name] = (leaf.shape, leaf.dtype, np.sum(sums, axis=0) % 2**32)
    assert digest_of_sums(leaves) == DIGEST


def test_every_change_of_weights_changes_the_digest():
    def changed(name, change):
        leaves = tree()
        leaves[name] = change(leaves[name])
        return leaves

    def flipped(leaf):
        bits = np.array(leaf).view(np.uint32).reshape(-1)
        bits[5] ^= 1
        return bits.view(np.float32).reshape(leaf.shape)

    def exchanged(leaf):
        leaf = leaf.copy()
        leaf[0, 0, [0, 1]] = leaf[0, 0, [1, 0]]
        return leaf

    others = [
        changed("a/kernel", flipped),
        changed("a/kernel", exchanged),
        changed("a/kernel", lambda leaf: leaf[::-1]),
        changed("a/kernel", lambda leaf: leaf.reshape(4, 16, 8)),
        changed("a/kernel", lambda leaf: -leaf),
        changed("a/bias", lambda leaf: leaf.astype(np.float32)),
        tree() | {"a/kernel": tree()["b/kernel"], "b/kernel": tree()["a/kernel"]},
        {name.replace("b/", "c/"): leaf for name, leaf in tree().items()},
        {name: leaf for name, leaf in tree().items() if name != "none"},
    ]
    assert len({DIGEST, *map(digest, others)}) == 1 + len(others)


def test_training_stores_the_digest_of_what_others_read(video_run, lora_run):
    for workdir in (video_run, lora_run):
        found = find_checkpoint(workdir)
        averaged = digest(leaf_paths(stored(workdir, use_ema=True)))
        assert found.meta["digest"] == averaged == stored_digest(workdir, found.step)
    assert find_checkpoint(lora_run).identity["lora"] == {"rank": 4, "alpha": 8.0}
    assert "lora" not in find_checkpoint(video_run).identity


def test_numbers_that_were_not_saved_are_not_read(video_run, tmp_path):
    """Sound files of another step in the place of this one's, and a meta of another checkpoint."""
    shutil.copytree(video_run, tmp_path / "video")
    steps = [tmp_path / "video" / "checkpoints" / step for step in ("4", "5")]
    shutil.rmtree(steps[1] / "state")
    shutil.copytree(steps[0] / "state", steps[1] / "state")
    with pytest.raises(OSError, match=r"checkpoints/5 cannot be read .*digest .* when they were"):
        backbone(tmp_path / "video")
    backbone(tmp_path / "video", step=4)


def backbone(checkpoint, **options):
    experiment = Experiment.from_config(five_steps("action", checkpoint))
    mesh = experiment.mesh()
    with jax.set_mesh(mesh):
        return load_backbone(experiment, mesh, **options)[1]


# The backbone of stage 2.


def chosen(directory, trained, **settings):
    config = tiny_config("action")
    config.backbone.checkpoint = str(directory)
    config.update_from_flattened_dict(settings)
    return backbone_checkpoint(Experiment.from_config(config), trained, "runs/action")


def test_a_decoder_stays_with_the_step_it_was_trained_on(video_run, tmp_path, caplog):
    experiment = Experiment.from_config(five_steps("action", video_run))
    known = backbone_identity(experiment, find_checkpoint(video_run, 3))
    assert chosen(video_run, known).step == 3
    assert chosen(video_run, None).step == 5 and not caplog.records
    assert chosen(video_run, {}).step == 5
    assert "runs/action does not store the step" in caplog.text

    moved = tmp_path / "elsewhere"
    shutil.copytree(video_run, moved)
    (tmp_path / "link").symlink_to(moved)
    assert chosen(tmp_path / "link", known).step == 3
    (moved / "checkpoints" / "3").rename(moved / "checkpoints" / "30")
    assert chosen(moved, known).step == 30  # the same weights
    shutil.rmtree(moved / "checkpoints" / "30")
    with pytest.raises(CheckpointMismatch, match=r"trained on step 3 .* the steps \[1, 2, 4, 5\]"):
        chosen(moved, known)
    shutil.copytree(moved / "checkpoints" / "4", moved / "checkpoints" / "3")
    with pytest.raises(CheckpointMismatch, match=r"step now holds other weights \(digest is '"):
        chosen(moved, known)
    shutil.copytree(video_run / "checkpoints" / "3", moved / "checkpoints" / "30")
    assert chosen(moved, known).step == 30  # although step 3 is another one by now


def test_a_run_that_cannot_be_read_for_a_while_is_not_a_new_one(video_run, tmp_path, monkeypatch):
    """It would be continued on the newest step of its backbone."""
    shutil.copytree(video_run, tmp_path / "run")
    assert trained_backbone(tmp_path / "run") == {} and trained_backbone(tmp_path) is None
    newest = tmp_path / "run/checkpoints/5/meta/metadata"
    newest.write_text(newest.read_text()[:-20])
    monkeypatch.setattr(damage, "PAUSES", (0.0,))
    assert trained_backbone(tmp_path / "run") == {}  # of the one before

    def away(item):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("mvjax.training.directory.read_json", away)
    with pytest.raises(OSError, match="nothing shows that it is damaged"):
        trained_backbone(tmp_path / "run")


def test_the_same_adapters_with_another_alpha_are_another_backbone(lora_run, tmp_path):
    known = find_checkpoint(lora_run).identity | {"directory": str(lora_run)}
    shutil.copytree(lora_run, tmp_path / "lora")
    path = tmp_path / "lora" / "checkpoints" / "2" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["config"]["lora"]["alpha"] = 16.0
    path.write_text(json.dumps(meta))
    with pytest.raises(CheckpointMismatch, match=r"lora\.alpha is 8\.0 there, 16\.0 here"):
        chosen(tmp_path / "lora", known)


def test_an_untrained_backbone_is_another_one_with_another_seed(video_run):
    untrained = {"untrained": 0}
    assert chosen("", untrained) is None
    for directory, settings in (("", {"training.seed": 1}), (video_run, {})):
        with pytest.raises(CheckpointMismatch, match="an untrained backbone of seed 0, but"):
            chosen(directory, untrained, **settings)
    trained = find_checkpoint(video_run).identity | {"directory": "runs/video"}
    with pytest.raises(CheckpointMismatch, match=r"trained on step 5 of runs/video .*'' and"):
        chosen("", trained)


# The identity of a policy.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_run(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def what(folder, **settings):
    config = run_config(folder)
    config.update_from_flattened_dict(settings)
    experiment = Experiment.from_config(config)
    return load_policy(experiment, folder / "action", experiment.sampling(), 1).identity["what"]


@pytest.fixture(scope="module")
def first(saved):
    return what(saved)


def test_a_policy_is_the_same_wherever_it_lies(first, folder, caplog):
    path = folder / "action" / "normalizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=2))
    assert what(folder) == first == json.loads(json.dumps(first))
    assert "does not store a digest of its weights" in caplog.text  # as in earlier versions


def test_the_identity_of_a_policy_without_views_is_that_of_earlier_versions(first):
    """Evaluations that an earlier version began are continued, so no setting may be added."""
    assert first["settings"]["backbone"].keys().isdisjoint({"views", "attention", "remat"})
    assert "views" not in first["settings"]["clip"]


def edited(path, change):
    """Changes the statistics of the actions in a normalizer.json."""
    content = json.loads(path.read_text())
    for name, values in content["actions"].items():
        content["actions"][name] = change(np.array(values)).tolist()
    path.write_text(json.dumps(content))


def test_the_identity_names_all_that_is_another_one(first, folder):
    """Every file has kept its name and its step."""
    for stage, config in (("video", tiny_config("video")), ("action", run_config(folder))):
        shutil.rmtree(folder / stage / "checkpoints")
        config.training.seed = 7
        save_untrained(config, folder / stage)
    with np.load(folder / "tokenizer.npz") as arrays:
        arrays = dict(arrays)
    np.savez(folder / "tokenizer.npz", **{k: v + np.float32(1e-3) for k, v in arrays.items()})
    edited(folder / "action" / "normalizer.json", lambda values: values + 1e-3)
    settings = {"backbone.precision": "bfloat16", "decoder.precision": "published"}
    found = differences(first, what(folder, embodiment="metaworld_sawyer", **settings))
    assert [sentence.partition(" is ")[0] for sentence in found] == [
        "backbone.digest",
        "decoder.digest",
        "normalizer.digest",
        "settings.backbone.precision",
        "settings.decoder.precision",
        "tokenizer.digest",
    ]


def test_statistics_that_do_not_fit_are_refused_before_weights_are_read(folder):
    path = folder / "action" / "normalizer.json"
    edited(path, lambda values: np.concatenate([values, values], axis=-1))  # of a robot with more
    with pytest.raises(CheckpointMismatch, match=r"normalizer\.json does not fit policy_io"):
        what(folder)


def test_statistics_that_were_changed_after_training_are_refused(folder):
    path = folder / "action" / "normalizer.json"
    meta = folder / "action" / "checkpoints" / "0" / "meta" / "metadata"
    content = json.loads(meta.read_text()) | {"normalizer_digest": digest_of_json(path)}
    meta.write_text(json.dumps(content))
    experiment = Experiment.from_config(run_config(folder))
    assert load._normalizer(find_checkpoint(folder / "action"), experiment.config)
    edited(path, lambda values: values * 1.01)
    with pytest.raises(CheckpointMismatch, match=r"normalizer\.json has been changed since"):
        what(folder)


def test_a_checkpoint_that_training_deletes_while_it_is_read_is_read_again(
    folder, monkeypatch, caplog
):
    def overtaken(experiment, directory, *rest, **options):
        checkpoints = directory / "checkpoints"
        if (checkpoints / "0").exists():
            (checkpoints / "0").rename(checkpoints / "12")
            raise OSError("no such file")
        return real(experiment, directory, *rest, **options)

    real = load.load_decoder
    monkeypatch.setattr(load, "load_decoder", overtaken)
    assert what(folder)["decoder"]["step"] == 12
    assert "step 0 of " in caplog.text and "was deleted while it was being read" in caplog.text


# Folders of results.


def test_a_folder_takes_the_results_of_one_identity(tmp_path, caplog):
    ours, there = {"policy": {"digest": "a"}, "execute": 8}, {"devices": "1 x cpu"}
    claim(tmp_path, ours, there, begun=False)
    claim(tmp_path, ours, there, begun=True)
    claim(tmp_path, ours, there, begun=True, process=1)
    assert read_identity(tmp_path) == {"what": ours, "where": [there]}
    assert not caplog.records
    claim(tmp_path, ours, {"devices": "8 x TPU v5e"}, begun=True)
    assert (
        "continued in another place: devices is '1 x cpu' there, '8 x TPU v5e' here" in caplog.text
    )
    assert len(read_identity(tmp_path)["where"]) == 2

    other = {"policy": {"digest": "b"}, "execute": 4}
    for process in (0, 1):
        with pytest.raises(ValueError, match=r"execute is 8 there, 4 here; policy\.digest is 'a'"):
            claim(tmp_path, other, there, begun=True, process=process)
    assert read_identity(tmp_path)["what"] == ours
    claim(tmp_path, other, there, begun=False)  # it was stopped before its first result
    assert read_identity(tmp_path) == {"what": other, "where": [there]}


def test_a_process_with_other_versions_says_for_what_it_waits(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(identity, "PATIENCE", 0.0)
    claim(tmp_path, {"mujoco": "3.2"}, {}, begun=False)
    late = threading.Timer(0.5, claim, [tmp_path, {"mujoco": "3.3"}, {}], {"begun": False})
    late.start()
    claim(tmp_path, {"mujoco": "3.3"}, {}, begun=False, process=1)
    assert caplog.text.count("process 1 is still waiting for process 0") == 1
    assert "mujoco is '3.2' there, '3.3' here" in caplog.text


def test_results_of_earlier_versions_are_not_continued(tmp_path):
    with pytest.raises(ValueError, match=r"earlier version.* can be read, but not continued"):
        claim(tmp_path, {}, {}, begun=True)
    assert not any(tmp_path.iterdir())


if __name__ == "__main__":
    identity._SMALL, identity._on_host = -1, lambda leaf: False
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x", "y"), ()))
    leaves = tree().items()
    spread = {n: jax.device_put(leaf, split if leaf.ndim == 3 else whole) for n, leaf in leaves}
    assert len(spread["a/kernel"].addressable_shards) == 8 and jnp.ndim(spread["scale"]) == 0
    print(digest(spread))
