"""Joint training: each network learns as in its own stage, and one directory serves as both."""

import shutil

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encode_toys import SIZE
from run_records import without_times
from test_converted_run import HINTS, stored
from test_two_embodiments import config_of, encode
from tiny_stages import VIEWS, build_stage, quick_compiles, tiny_batch, tiny_config

from data_pipelines.normalize import load_normalizers
from mvjax.experiment import Experiment
from mvjax.flow import condition_mask, network_input, observed_input
from mvjax.models.lora import LoRA, merge_lora
from mvjax.parallel import make_mesh
from mvjax.policy.generate import load_video_model
from mvjax.policy.load import load_policy, load_trained
from mvjax.policy.observation import Observation
from mvjax.training.bridge import backbone_checkpoint, backbone_identity, load_backbone
from mvjax.training.damage import CheckpointMismatch
from mvjax.training.directory import abstract_params, find_checkpoint, stored_digest
from mvjax.training.metrics import read_records
from mvjax.training.objectives import action_stage, batch_views, video_stage
from mvjax.training.resume import _given_params
from mvjax.training.run import run
from mvjax.training.step import abstract_state, make_optimizer
from mvjax.weights.convert import prepare, prepare_exports, write, write_export
from mvjax.weights.source import open_source

pytestmark = pytest.mark.usefixtures("quickly")
KEY = jax.random.key(5)
NETWORKS = ("video", "action")
WEIGHTS = dict(video_weight=3.0, action_weight=0.5)


def joint_config(**flow):
    config = tiny_config("joint")
    config.video_model.num_blocks = 3  # one of them after the context
    config.video_model.remat = config.decoder.remat = "full"  # one block is compiled, not all
    config.context_layer = 2
    config.flow.update(**WEIGHTS, **flow)
    return config


def random_params(network):
    """Parameters of networks that have left their start, where modulations are zero."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(network.init, jax.random.key(1))
    widths = lambda p: p.shape[-2] if len(p.shape) > 1 else 4  # noqa: E731
    return jax.tree.map(
        lambda p: (rng.normal(size=p.shape) / np.sqrt(widths(p))).astype(np.float32), shapes
    )


def gradient(stage, params, frozen, batch, draws):
    return jax.jit(jax.value_and_grad(stage.objective, has_aux=True))(params, frozen, batch, draws)


def assert_close(tree, other, scale):
    tree, other = jax.device_get((tree, other))
    whole = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(other)))
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert np.linalg.norm(x - scale * y) <= 1e-5 * scale * (np.linalg.norm(y) + 0.01 * whole)


def test_without_the_actions_gradient_each_network_learns_as_in_its_own_stage():
    """The same numbers are drawn as in stage 2, and stage 1 is given them."""
    config = joint_config(action_gradient=False)
    stage = build_stage(config)[0]
    batch, params = tiny_batch(config), random_params(stage)
    batch["action_mask"][:3] = 0
    draws = jax.jit(stage.draw)(batch, KEY)
    (loss, metrics), grads = gradient(stage, params, {}, batch, draws)

    sections = dict(config.to_dict(), stage="video")
    for name in (*WEIGHTS, "action_gradient"):
        del sections["flow"][name]
    del sections["optimizer"]["backbone_rate"]
    sections["flow"].update(loss_scale=1.0, min_condition_latents=2)
    video = video_stage(Experiment.from_config(sections))
    observed = jnp.full(len(batch["latents"]), 2)
    of_video = {"sigma": draws["sigma"], "noise": draws["video_noise"], "observed": observed}
    (video_loss, alone), video_grads = gradient(video, params["backbone"], {}, batch, of_video)
    np.testing.assert_allclose(metrics["video/velocity_mse"], video_loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["by_level"]["video"], alone["by_level"], rtol=1e-5)
    assert_close(grads["backbone"], video_grads, 3.0)

    sections.update(stage="action", backbone=dict(checkpoint="", precision="float32"))
    model = Experiment.from_config(config).video
    action = action_stage(
        Experiment.from_config(sections), None, lambda *_: (model, params["backbone"])
    )
    jax.tree.map(np.testing.assert_array_equal, jax.jit(action.draw)(batch, KEY), draws)
    (action_loss, alone), action_grads = gradient(
        action, params["decoder"], params["backbone"], batch, draws
    )
    np.testing.assert_allclose(metrics["action/velocity_mse"], action_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["by_level"]["action"], alone["by_level"], rtol=1e-4)
    assert_close(grads["decoder"], action_grads, 0.5)
    np.testing.assert_allclose(loss, 3 * video_loss + 0.5 * action_loss, rtol=1e-5)
    assert metrics["action/share"] == 5 / 8

    config.flow.action_gradient = True
    reaching = gradient(build_stage(config)[0], params, {}, batch, draws)[1]
    assert_close(reaching["decoder"], action_grads, 0.5)
    # Below the context the backbone learns from the actions too, after it from the video alone.
    kernel = lambda tree: np.asarray(tree["backbone"]["blocks"]["mlp"]["layer1"]["kernel"])  # noqa: E731
    ours, apart = kernel(reaching), kernel(grads)
    np.testing.assert_allclose(ours[2], apart[2], rtol=1e-4, atol=1e-7)
    assert all(np.abs(ours[i] - apart[i]).max() > 1e-3 * np.abs(apart[i]).max() for i in (0, 1))


@pytest.mark.parametrize("frames", ["all", "observed"])
def test_one_pass_gives_the_velocity_of_stage_1_and_the_context_of_the_policy(frames):
    """With observed frames alone, the policy's pass has no future; the joint one has."""
    config = joint_config()
    config.clip.views, config.context_frames = VIEWS, frames
    if frames == "observed":
        config.video_model.attention_to = "observed_first"
    experiment = Experiment.from_config(config)
    network, batch = experiment.video_network, tiny_batch(config)
    params = random_params(network)
    x0, text, views = batch["latents"], batch["text"], batch_views(experiment, batch)
    mask = condition_mask(jnp.full(len(x0), 2), x0.shape[1])
    i = network_input(2 * x0[::-1], x0, jnp.full((len(x0), 1), 1.5), mask, views)
    read = i if frames == "all" else observed_input(x0[:, :2], views)

    @jax.jit
    def apart(params):
        net = network.bind(params)
        arguments = read.latents, read.timesteps, text, read.condition_mask
        return net.velocity(i, text), net.hidden(*arguments, views=read.views, layer=2)

    @jax.jit
    def together(params):
        net = network.bind(params)
        return net.velocity_and_hidden(i, text, layer=2, observed_only=frames == "observed")

    for ours, theirs in zip(together(params), apart(params), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


# --- A run on a robot's records and on videos of people, with adapters ---


def run_config(folder):
    config = config_of("joint", folder)
    del config.datasets["giant"]
    config.lora.update(rank=4, alpha=8.0)
    config.training.update(steps=2, checkpoint_every=1, keep=2, ema_decay=0.9)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records of an arm and of people, and a joint training directory of two steps on them."""
    folder = tmp_path_factory.mktemp("joint")
    encode(run_config(folder), folder)
    with quick_compiles():
        run(Experiment.from_config(run_config(folder)), folder / "joint")
    return folder


def test_windows_without_actions_teach_the_video_model_alone(folder):
    for record in read_records(folder / "joint"):
        assert record["action/share"] == 0.5
        counts = [
            sum(v for k, v in record.items() if k.startswith(f"{loss}/samples/"))
            for loss in NETWORKS
        ]
        assert counts == [8, 4 * 2]  # windows, and draws for those of the arm
        assert np.isfinite([record["video/velocity_mse"], record["action/velocity_mse"]]).all()
    assert set(load_normalizers(folder / "joint/normalizer.json").by_embodiment) == {"arm"}
    changed = {"datasets.human.action": "action", "datasets.human.proprio": "state"}
    experiment = Experiment.from_config(run_config(folder)).changed(changed)
    with pytest.raises(ValueError, match=r"dataset\.action is '' there, 'action' here"):
        run(experiment, folder / "another")


def test_it_goes_on_bit_for_bit_and_on_eight_devices(folder, tmp_path):
    before, ends = read_records(folder / "joint"), {}
    for name in ("one", "eight"):
        shutil.copytree(folder / "joint", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints/2")
        ends[name] = tmp_path / name
    run(Experiment.from_config(run_config(folder)), ends["one"])
    assert without_times(read_records(ends["one"])) == without_times(before)
    digests = [find_checkpoint(f).meta["digest"] for f in (ends["one"], folder / "joint")]
    assert digests[0] == digests[1]
    said = forked.run("joint_meshes", folder, ends["eight"], devices=8)
    assert said.code == 0, said.err
    other = read_records(ends["eight"])[-1]
    for name in ("loss", "grad_norm", "video/velocity_mse", "action/velocity_mse"):
        assert other[name] == pytest.approx(before[-1][name], rel=1e-5), name


def test_its_directory_is_that_of_a_policy_of_a_backbone_and_of_a_video_model(folder):
    directory = folder / "joint"
    held = find_checkpoint(directory)
    policy = load_trained(directory)
    frames = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    query = Observation(frames, np.zeros((1, 4), np.float32), "open the drawer", noise_key=("a", 0))
    (chunk,) = policy.act([query])
    assert chunk.shape == (4, 4) and np.isfinite(chunk).all()
    what = policy.identity["what"]
    assert what["decoder"] == held.network("action").identity
    assert what["backbone"] == held.network("video").identity
    assert what["backbone"]["lora"] == {"rank": 4, "alpha": 8.0} and "lora" not in what["decoder"]
    for part, stage in (("backbone", "video"), ("decoder", "action")):
        assert stored_digest(directory, 2, part) == held.network(stage).identity["digest"]

    later = config_of("action", folder)
    later.backbone.checkpoint = str(directory)
    experiment = Experiment.from_config(later)
    chosen = backbone_checkpoint(experiment)
    trained = backbone_identity(experiment, chosen)
    assert backbone_checkpoint(experiment, trained, "a decoder").identity == chosen.identity
    mesh = make_mesh(later.mesh)
    with jax.set_mesh(mesh):
        params = load_backbone(experiment, mesh)[1]
    jax.tree.map(np.testing.assert_array_equal, params, policy.weights[1])
    jax.tree.map(
        np.testing.assert_array_equal, params, load_video_model(directory, "float32").params
    )
    with pytest.raises(CheckpointMismatch, match="stage 'joint', but this configuration is of"):
        load_policy(experiment, directory, experiment.sampling(), 1)


def given_params(config):
    """What a new run begins with, as far as its configuration names it."""
    stage, mesh, rules = build_stage(config)
    optimizer = make_optimizer(config.optimizer)
    abstract = abstract_state(stage, optimizer, False, mesh, rules)
    return _given_params(config, stage, abstract.params)


def test_the_releases_two_files_of_a_run_are_where_another_starts(folder, tmp_path):
    """Adapters kept, everything comes back bit for bit; merged, the backbone is the policy's."""
    directory, config = folder / "joint", run_config(folder)
    exports = {}
    for lora in ("keep", "merge"):
        exports = prepare_exports(directory, tmp_path / lora, "mimic-video", lora=lora)
        for path, export in exports.items():
            write_export(export, path)
        for name, path in zip(("video", "action"), exports, strict=True):
            conversion = prepare(open_source(path, HINTS), lora=lora, alpha=8.0)
            write(conversion, tmp_path / lora / name)
    config.init_from = str(tmp_path / "keep/video")
    config.decoder_init_from = str(tmp_path / "keep/action")
    given = given_params(config)
    expected = stored(directory, given)
    assert jax.tree.map(np.shape, given) == jax.tree.map(np.shape, abstract_params(directory))
    jax.tree.map(np.testing.assert_array_equal, given, expected)
    config.update(init_from=str(directory), decoder_init_from="")  # both from another joint run
    jax.tree.map(np.testing.assert_array_equal, given_params(config), expected)

    config.update(init_from=str(tmp_path / "merge/video"))
    config.lora.rank = 0
    given = given_params(config)
    assert set(given) == {"backbone"}  # the decoder is drawn
    merged = merge_lora(expected["backbone"], LoRA(4, 8.0, ()))
    for ours, theirs in zip(*map(jax.tree.leaves, (given["backbone"], merged)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    config.init_from = str(tmp_path / "keep/action")
    with pytest.raises(CheckpointMismatch, match="stage 'action', but a run of stage 'video'"):
        given_params(config)
    (path,) = prepare_exports(directory, tmp_path / "diffusers", "diffusers")
    assert path == tmp_path / "diffusers"


def test_the_backbone_has_a_rate_of_its_own():
    config = joint_config().optimizer
    params = {name: {"kernel": jnp.ones(3)} for name in ("backbone", "decoder")}
    updates = {}
    for rate in (1.0, 0.25):
        config.backbone_rate = rate
        optimizer = make_optimizer(config)
        updates[rate] = optimizer.update(params, optimizer.init(params), params)[0]
    same, slower = (updates[rate] for rate in (1.0, 0.25))
    np.testing.assert_array_equal(slower["backbone"]["kernel"], 0.25 * same["backbone"]["kernel"])
    np.testing.assert_array_equal(slower["decoder"]["kernel"], same["decoder"]["kernel"])
