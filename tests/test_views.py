"""Observed views beside the video: what the network computes with them, and which checkpoints fit.

That eight devices compute the same is in test_sharded.py and test_splash.py, the operations are in
test_flops.py, and the losses in test_objectives.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_video_dit import evaluated, plainly, random_params
from tiny_stages import VIEWS, build_stage, save_untrained, tiny_batch, tiny_config

from mvjax.experiment import Experiment
from mvjax.flow import CONDITION_SIGMA, condition_mask, flow_time, network_input
from mvjax.models.lora import learns_with_lora
from mvjax.training.bridge import load_backbone, load_decoder
from mvjax.training.checkpoint import Store
from mvjax.training.damage import CheckpointMismatch
from mvjax.training.objectives import batch_views
from mvjax.training.resume import describe, first_state
from mvjax.training.step import assemble
from mvjax.weights.convert import prepare_export
from mvjax.weights.files import WeightsError

pytestmark = pytest.mark.usefixtures("quickly")


def with_views(stage="video", views=VIEWS, **settings):
    config = tiny_config(stage)
    config.clip.views = views
    config.training.batch_size = 2
    config.update_from_flattened_dict(settings)
    return config


@pytest.fixture(scope="module")
def seen(quickly):
    """A network of two views, its parameters, and what it is called with."""
    experiment = Experiment.from_config(with_views())
    batch, sigma = tiny_batch(experiment.config), jnp.array([[3.0], [0.4]])
    x0, frames = batch["latents"], experiment.clip.latent_frames
    mask = condition_mask(jnp.array([1, 2]), frames)
    i = network_input(2.0 * x0, x0, sigma, mask, batch_views(experiment, batch))
    network = experiment.video_network
    return network, random_params(network), i, batch["text"]


# --- What the network computes ---


def test_views_are_tokens_of_one_joined_attention(seen):
    network, params, i, text = seen
    velocity, hidden = jax.jit(lambda params: plainly(network.config, params, i, text))(params)
    ours = evaluated(network, params, i, text)
    np.testing.assert_allclose(ours, velocity, atol=1e-5 * np.abs(velocity).max())
    for layer, theirs in enumerate(hidden):
        ours = evaluated(network, params, i, text, layer)
        assert ours.shape == theirs.shape  # the video's tokens, then those of the views by name
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_views_of_equal_size_are_told_apart_by_their_embeddings_alone(quickly):
    sizes = dict(height=32, width=32)
    config = with_views(views=dict(left=sizes, right=sizes))
    experiment = Experiment.from_config(config)
    network, batch = experiment.video_network, tiny_batch(config)
    params, x0 = random_params(network), batch["latents"]
    params["view_embedding"] = jax.tree.map(np.zeros_like, params["view_embedding"])
    mask, views = condition_mask(jnp.full(2, 2), x0.shape[1]), batch_views(experiment, batch)
    swapped = dict(left=views["right"], right=views["left"])

    def change(params):
        inputs = (network_input(x0, x0, jnp.ones((2, 1)), mask, v) for v in (views, swapped))
        one, other = (evaluated(network, params, i, batch["text"]) for i in inputs)
        return np.linalg.norm(one - other) / np.linalg.norm(one)

    assert change(params) < 1e-6
    params["view_embedding"]["left"] = np.linspace(-1, 1, network.config.width, dtype=np.float32)
    assert change(params) > 1e-3


def test_a_view_is_clean_and_has_the_time_of_conditioning_frames(seen):
    _, _, i, _ = seen
    observed = flow_time(np.float32(CONDITION_SIGMA))
    batch = tiny_batch(with_views())
    for name, view in i.views.items():
        np.testing.assert_array_equal(view.latents, batch[f"views/{name}"])
        np.testing.assert_array_equal(view.time, np.full((2, 1), observed))
    assert i.timesteps[0, 0] == observed


def test_other_views_than_those_of_the_configuration_are_refused(seen):
    network, params, i, text = seen
    one = i._replace(views={"wrist": i.views["wrist"]})
    with pytest.raises(ValueError, match=r"reads the views hand, wrist .* got wrist"):
        evaluated(network, params, one, text)
    without = Experiment.from_config(tiny_config("video")).video_network
    with pytest.raises(ValueError, match="got hand, wrist"):
        evaluated(without, without.init(jax.random.key(0)), i, text)


@pytest.mark.parametrize(
    ("views", "words"),
    [
        ({"wrist": dict(height=40, width=32)}, "views.wrist.height must be a multiple of 16"),
        ({"wrist": dict(height=0, width=32)}, "views.wrist.height must be a whole number"),
        ({"wrist": dict(height=32, width=32, fps=5)}, "no setting 'clip.views.wrist.fps'"),
        ({"video": dict(height=32, width=32)}, "'video' is the name of the predicted view"),
        ({"a/b": dict(height=32, width=32)}, "a name is a word such as wrist"),
    ],
)
def test_impossible_views_are_a_sentence(views, words):
    with pytest.raises(ValueError, match=words):
        Experiment.from_config(with_views(views=views))


def test_a_view_has_tokens_of_its_observed_frames_only():
    experiment = Experiment.from_config(with_views())
    clip = experiment.clip
    assert clip.view_shapes == {"hand": (2, 2, 6, 16), "wrist": (2, 4, 4, 16)}
    assert experiment.tokens == clip.tokens + 2 * 3 + 2 * 4
    assert experiment.batch_shapes["views/wrist"] == (2, 4, 4, 16)
    assert Experiment.from_config(tiny_config("video")).tokens == clip.tokens


# --- Checkpoints ---


def started(config, workdir):
    """The parameters with which a run begins in `workdir`."""
    stage, mesh, _ = build_stage(config)
    experiment = Experiment.from_config(config)
    optimizer, abstract, _ = assemble(experiment, stage, mesh)
    with jax.set_mesh(mesh), Store(workdir, keep=1) as store:
        meta = describe(experiment, stage, {})
        return first_state(experiment, stage, optimizer, abstract, store, None, meta).params


@pytest.fixture(scope="module")
def runs(tmp_path_factory, quickly):
    """Untrained runs of stage 1 without views and with two, and their parameters."""
    folder = tmp_path_factory.mktemp("views")
    one, two = folder / "one", folder / "two"
    return one, save_untrained(tiny_config("video"), one), two, save_untrained(with_views(), two)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_with_views_starts_from_one_without(runs, rank, tmp_path, caplog):
    one, params, *_ = runs
    config = with_views(init_from=str(one), **{"lora.rank": rank})
    with caplog.at_level("INFO"):
        state = started(config, tmp_path)
    assert caplog.text.count("has no view hand, wrist; its embedding starts at zero") == 1
    embedding = state.pop("view_embedding")
    assert embedding.keys() == VIEWS.keys() and not any(map(np.any, embedding.values()))
    for name in ("x_embedder", "final_layer"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params[name]):
            ours = state[name]
            for key in path:
                ours = ours[key.key]
            np.testing.assert_array_equal(ours, leaf)
    assert learns_with_lora(("view_embedding", "wrist"))


def test_a_view_that_a_run_lacks_is_new_and_one_that_it_has_is_not_dropped(runs, tmp_path):
    *_, two, params = runs
    more = with_views(views=dict(VIEWS, third=dict(height=16, width=16)), init_from=str(two))
    state = started(more, tmp_path / "more")
    jax.tree.map(np.testing.assert_array_equal, state["blocks"], params["blocks"])
    fewer = with_views(views=dict(wrist=VIEWS["wrist"]), init_from=str(two))
    with pytest.raises(CheckpointMismatch, match=r"views hand, wrist, of which .* lacks hand"):
        started(fewer, tmp_path / "fewer")


@pytest.mark.parametrize(
    ("trained", "views", "words"),
    [
        ("two", {}, "with the views hand, wrist beside the video, but .* has none"),
        ("one", VIEWS, "with none beside .* has the views hand, wrist"),
        ("two", dict(VIEWS, hand=dict(height=16, width=32)), "views.hand.width is 48 there, 32"),
        ("two", dict(palm=VIEWS["hand"]), "the views hand, wrist beside .* has the views palm"),
    ],
)
def test_a_backbone_of_other_views_is_refused_by_name(runs, trained, views, words):
    directory = dict(one=runs[0], two=runs[2])[trained]
    config = with_views("action", views, **{"backbone.checkpoint": str(directory)})
    experiment = Experiment.from_config(config)
    with pytest.raises(CheckpointMismatch, match=words):
        load_backbone(experiment, experiment.mesh())


def test_a_backbone_of_other_cameras_is_said(runs, caplog):
    """Of equal shapes: the same dataset shows the decoder another camera."""
    config = with_views("action", **{"backbone.checkpoint": str(runs[2])})
    for camera in (config.datasets.robot.video, "observation.images.other"):
        config.datasets.robot.video = camera
        caplog.clear()
        experiment = Experiment.from_config(config)
        load_backbone(experiment, experiment.mesh())
        said = "trained on other cameras" in caplog.text
        assert said == (camera == "observation.images.other")
    assert "datasets.robot.video" in caplog.text


def test_a_backbone_and_a_decoder_with_views_are_read_again(runs, tmp_path):
    _, _, two, params = runs
    config = with_views("action", **{"backbone.checkpoint": str(two)})
    experiment = Experiment.from_config(config)
    _, backbone = load_backbone(experiment, experiment.mesh())
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_array_equal(ours, theirs.astype(ours.dtype)),
        backbone,
        params,
    )
    decoder = save_untrained(config, tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_decoder(experiment, tmp_path, experiment.mesh()),
        decoder,
    )
    config.clip.views = {}
    with pytest.raises(CheckpointMismatch, match="trained with the views hand, wrist"):
        other = Experiment.from_config(config)
        load_decoder(other, tmp_path, other.mesh())


def test_a_run_does_not_go_on_with_other_views(runs, tmp_path):
    config = with_views()
    save_untrained(config, tmp_path)
    config.clip.views.hand.width = 32
    with pytest.raises(CheckpointMismatch, match=r"views.hand.width is 48 there, 32 here"):
        started(config, tmp_path)


@pytest.mark.parametrize("target", ["mimic-video", "diffusers"])
def test_the_published_files_have_no_place_for_views(runs, target):
    with pytest.raises(WeightsError, match=f"views hand, wrist .* cannot be written for {target}"):
        prepare_export(runs[2], target)
