"""Records and training runs written by commit 2562b9d open, and go on as they did then.

`fixtures/make_commit_2562b9d.py` says how they were made. The paths that they hold are relative to
the folder of a project, as the test's is.
"""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import trained
from data_pipelines.normalize import load_normalizers
from data_pipelines.records import RecordDataset
from mvjax.experiment import Experiment
from mvjax.parallel import make_mesh
from mvjax.policy import policy as policy_module
from mvjax.policy.load import load_trained
from mvjax.policy.observation import Observation
from mvjax.training.bridge import load_backbone
from mvjax.training.checkpoint import leaf_paths
from mvjax.training.damage import CheckpointMismatch
from mvjax.training.directory import find_checkpoint, read_meta
from mvjax.training.metrics import read_records
from mvjax.training.run import run

pytestmark = pytest.mark.usefixtures("quickly")
FIXTURE = Path(__file__).parent / "fixtures/commit_2562b9d"
ROOT = Path("data/tiny")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project that has the files where the project of then had them."""
    shutil.copytree(FIXTURE, tmp_path / ROOT)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def expected():
    """What the code of then read out of the files."""
    with np.load(FIXTURE / "expected.npz") as numbers:
        return dict(numbers)


@pytest.mark.parametrize("name", ["robot", "video"])
def test_records_hold_what_they_held(expected, name):
    records = RecordDataset(ROOT / "records" / name)
    then = {
        key.removeprefix(f"records/{name}/"): value
        for key, value in expected.items()
        if key.startswith(f"records/{name}/")
    }
    assert len(records) == then["count"]
    assert records.fingerprint == then["fingerprint"]
    assert records.instructions == then["instructions"].tolist()
    for index, text in enumerate(then["texts"]):
        np.testing.assert_array_equal(records.text(index), text)
    for split in ("train", "validation"):
        np.testing.assert_array_equal(records.record_indices(split), then[split])
    for label, index in (("first", 0), ("last", len(records) - 1)):
        record = records[index]
        assert {f"{label}/{key}" for key in record} == {k for k in then if k.startswith(label)}
        for key, value in record.items():
            np.testing.assert_array_equal(
                value.astype(np.float32) if key == "latents" else value, then[f"{label}/{key}"]
            )
    digest = hashlib.sha256()
    for index in range(len(records)):
        for key, value in sorted(records[index].items()):
            digest.update(key.encode() + value.tobytes())
    assert digest.hexdigest() == then["sha256"]


def test_the_normalizer_is_the_same(expected):
    normalizers = load_normalizers(ROOT / "action/normalizer.json")
    assert normalizers.fingerprint == expected["normalizer/fingerprint"]
    normalizer = normalizers.of("metaworld_sawyer")
    for key in ("actions", "proprio"):
        for name, value in asdict(normalizer.affines[key]).items():
            np.testing.assert_array_equal(value, expected[f"normalizer/{key}/{name}"])
        for name in ("min", "max", "mean", "std"):
            np.testing.assert_array_equal(
                normalizer.statistics[key][name], expected[f"normalizer/{key}/statistics/{name}"]
            )


def test_stage_2_gets_the_same_backbone(expected):
    config = trained.get_config(str(ROOT / "action"))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model, backbone = load_backbone(Experiment.from_config(config), mesh)
    assert model.lora is None  # merged
    then = {
        key.removeprefix("backbone/"): value
        for key, value in expected.items()
        if key.startswith("backbone/")
    }
    leaves = leaf_paths(backbone)
    assert leaves.keys() == then.keys()
    for path, leaf in leaves.items():
        values = np.asarray(leaf, np.float64).ravel()
        sums = [values.sum(), values @ np.cos(np.arange(values.size)), np.abs(values).sum()]
        np.testing.assert_allclose(sums, then[path], rtol=1e-5, atol=1e-5, err_msg=path)


def test_the_policy_gives_the_same_chunks(expected, monkeypatch):
    observation = Observation(
        expected["observation/frames"],
        expected["observation/proprio"],
        str(expected["observation/instruction"]),
        noise_key=("then", 0),
    )
    # Fresh noise was seeded by the observation's bits then; now it is by the name of the query.
    digest = hashlib.blake2b(observation.instruction.encode(), digest_size=4, salt=bytes(8))
    digest.update(observation.frames.tobytes() + observation.proprio.tobytes())
    seed = int.from_bytes(digest.digest(), "big")
    monkeypatch.setattr(policy_module, "_query_seeds", lambda *_: (seed, seed))
    video_steps = int(trained.get_config(str(ROOT / "action")).sampler.video_steps)
    chunks = []
    for stop_step in (0, video_steps):
        policy = load_trained(ROOT / "action", stop_step)
        chunks.append(policy.act([observation])[0])
        np.testing.assert_allclose(chunks[-1], expected[f"chunk/{stop_step}"], rtol=1e-5, atol=1e-6)
    assert np.abs(chunks[0] - chunks[1]).max() > 1e-3  # the video is read


@pytest.mark.parametrize("stage", ["video", "action"])
def test_a_run_goes_on_as_it_did(expected, caplog, stage):
    """The first new loss tells of parameters, data and keys; the second of the optimizer, too."""
    caplog.set_level("INFO", "mvjax")
    workdir = ROOT / stage
    config = trained.get_config(str(workdir))
    done, config.training.steps = config.training.steps, len(expected[f"{stage}/loss"])
    last = run(Experiment.from_config(config), workdir)
    assert f"continuing {workdir.absolute()} at step {done}." in caplog.text
    records = read_records(workdir)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[-1] == last
    for name in ("loss", "grad_norm"):
        now = [record[name] for record in records]
        np.testing.assert_allclose(now, expected[f"{stage}/{name}"], rtol=1e-5)
    if stage == "action":
        stays_with_its_backbone(config, workdir, caplog)


def stays_with_its_backbone(config, workdir, caplog):
    """From here on the run stores what was missing, and goes on with nothing else."""
    assert "does not store the step of its backbone" in caplog.text
    backbone, known = find_checkpoint(ROOT / "video"), read_meta(workdir)["backbone"]
    assert known == {"directory": str(ROOT / "video"), **backbone.identity}
    config.training.steps += 1
    folder = ROOT / "video" / "checkpoints"
    (folder / str(backbone.step)).rename(folder / "1000")  # stage 1 was trained on
    with pytest.raises(CheckpointMismatch, match=r"was trained on step .* the steps \[1000\]"):
        run(Experiment.from_config(config), workdir)
    (folder / "1000").rename(folder / str(backbone.step))
    content = json.loads((workdir / "normalizer.json").read_text())
    content["actions"]["mean_clamped"] = content["actions"]["mean"]
    content["meta"]["changed"] = "by hand"
    (workdir / "normalizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointMismatch, match=r"normalizer\.json has been changed"):
        run(Experiment.from_config(config), workdir)
