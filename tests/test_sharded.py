"""Eight devices train as one does, however they are arranged, and share checkpoints with it.

`python tests/mesh_equality.py` compares every stage on every mesh, with and without accumulation.
"""

import json
import shutil

import forked
import jax
import numpy as np
import pytest
from tiny_stages import build_stage, five_steps, train_tiny

from mvjax.experiment import Experiment
from mvjax.training.checkpoint import Store
from mvjax.training.directory import abstract_params, restore_params
from mvjax.training.metrics import read_records
from mvjax.training.step import assemble

pytestmark = pytest.mark.usefixtures("quickly")
CASES = ["lora:8,1,1,1:2", "lora:1,8,1,1:1", "lora:1,1,8,1:1"]
CASES += ["views:2,2,2,1:2", "action_views:1,2,2,2:1", "observed_first_views:1,2,2,2:1"]


def run(program, *arguments):
    """What a program of this folder prints, given eight devices."""
    said = forked.run(program, *arguments, devices=8)
    assert said.code == 0, said.err
    return said.out


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Both stages on fsdp 2 x context 2 x tensor 2; the second reads the first's checkpoint there,
    and accumulates.
    """
    out = tmp_path_factory.mktemp("eight")
    run("tiny_stages", out, "data=1", "fsdp=2", "context=2", "tensor=2")
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory, eight, video_run, quickly):
    """The same on one device; the second stage reads the backbone trained on eight."""
    out = tmp_path_factory.mktemp("one")
    train_tiny(five_steps("action", eight / "video"), out / "action")
    (out / "video").symlink_to(video_run)
    return out


def first_gradient(workdir, config, tmp_path):
    """The first step's gradient: Adam's first moment after it, over 1 - b1."""
    shutil.copytree(workdir / "checkpoints" / "1", tmp_path / "checkpoints" / "1")
    stage, mesh, _ = build_stage(config)
    _, abstract, _ = assemble(Experiment.from_config(config), stage, mesh)
    with jax.set_mesh(mesh), Store(tmp_path, keep=1) as store:
        state = store.restore(abstract).state
    moment = state.opt_state.inner[1].mu
    return jax.tree.map(lambda m: np.asarray(m) / (1 - config.optimizer.b1), moment)


def parameters(workdir):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract_params(workdir)
    )
    return by_path(restore_params(workdir, wanted))


def by_path(tree):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("stage", ["video", "action"])
def test_losses_and_gradient_norms_are_equal(stage, one, eight):
    ours, theirs = (read_records(folder / stage) for folder in (one, eight))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == [1, 2, 3, 4, 5]
    assert len({r["loss"] for r in ours}) == 5
    for name in ("loss", "grad_norm", "update_norm", "param_norm"):
        values = [[record[name] for record in records] for records in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("stage", ["video", "action"])
def test_the_first_gradient_is_equal_tensor_by_tensor(stage, one, eight, tmp_path):
    config = five_steps(stage, eight / "video")
    ours, theirs = (
        by_path(first_gradient(folder / stage, config, tmp_path / folder.name))
        for folder in (one, eight)
    )
    assert ours.keys() == theirs.keys() and len(ours) > 20
    whole = np.sqrt(sum(np.sum(g**2) for g in ours.values()))
    assert np.isclose(whole, read_records(one / stage)[0]["grad_norm"], rtol=1e-4)
    for name, gradient in ours.items():
        difference = np.linalg.norm(theirs[name] - gradient)
        assert difference <= 1e-5 * np.linalg.norm(gradient) + 1e-7 * whole, name


def test_the_parameters_were_split_and_the_checkpoints_agree(one, eight):
    for stage in ("video", "action"):
        folder = eight / stage / "checkpoints" / "5" / "state"
        assert "fsdp" in json.dumps((folder / "_sharding").read_text())
        ours, theirs = parameters(one / stage), parameters(eight / stage)
        for name, value in ours.items():
            np.testing.assert_allclose(theirs[name], value, atol=2e-4, err_msg=name)


def test_other_arrangements_equal_one_device():
    """LoRA on the other meshes, on two of them with every batch in two parts; both stages with
    views beside the video, and stage 1 with attention of the present to itself.
    """
    results = [json.loads(line) for line in run("mesh_equality", *CASES).splitlines()]
    assert {result["case"] for result in results} == set(CASES)
    for result in results:
        assert len(set(result["losses"])) == 5 and result["tensors"] > 20
        assert result["loss"] < 1e-5 and result["gradient"] < 1e-5, result


def test_stage_2_on_two_devices_reads_what_stage_1_saved_on_eight(tmp_path):
    """Merged and cast as on one device, bit for bit, and split: only the small norms are whole."""
    result = json.loads(run("bridge_meshes", tmp_path))
    assert result["different"] == [] and result["tensors"] > 20
    assert (result["dtypes"], result["devices"]) == (["bfloat16"], [2])
    assert all(name.endswith("norm/scale") for name in result["whole"])
    assert result["bytes on a device"] < 0.51 * result["bytes"]


def test_a_policy_on_eight_devices_answers_as_on_one():
    meshes = ("8,1,1,1", "1,8,1,1", "1,2,2,2")
    lines = run("policy_meshes", *meshes).splitlines()
    differences = {mesh: float(number) for mesh, number in (line.rsplit(" ", 1) for line in lines)}
    kinds = ("single", "observed", "observed context")
    asked = {f"{mesh}/{kind}" for mesh in meshes for kind in kinds}
    assert differences.keys() == asked and max(differences.values()) < 1e-5, differences
