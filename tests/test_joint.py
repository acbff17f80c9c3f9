"""Joint training: each network learns as in its own stage, and one directory serves as both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_stages import VIEWS, build_stage, tiny_batch, tiny_config

from mvjax.experiment import Experiment
from mvjax.training.objectives import action_stage, joint_stage, video_stage

pytestmark = pytest.mark.usefixtures("quickly")
KEY = jax.random.key(5)
WEIGHTS = dict(video_weight=3.0, action_weight=0.5)


def joint_config(**flow):
    config = tiny_config("joint")
    config.video_model.num_blocks = 3  # one of them after the context
    config.context_layer = 2
    config.flow.update(**WEIGHTS, **flow)
    return config


def random_params(stage):
    """Parameters of networks that have left their start, where modulations are zero."""
    rng, params = np.random.default_rng(0), jax.jit(stage.init)(jax.random.key(1))
    return jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)


def gradient(stage, params, frozen, batch, draws):
    return jax.jit(jax.value_and_grad(stage.objective, has_aux=True))(params, frozen, batch, draws)


def assert_close(tree, other, scale):
    whole = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(other)))
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert np.linalg.norm(x - scale * y) <= 1e-5 * scale * (np.linalg.norm(y) + 0.01 * whole)


@pytest.mark.parametrize("views", [{}, VIEWS], ids=["video", "views"])
def test_without_the_actions_gradient_each_network_learns_as_in_its_own_stage(views):
    """The same numbers are drawn as in stage 2, and stage 1 is given them."""
    config = joint_config(action_gradient=False)
    config.clip.views = views
    stage = build_stage(config)[0]
    batch, params = tiny_batch(config), random_params(stage)
    batch["action_mask"][:3] = 0
    draws = stage.draw(batch, KEY)
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
    jax.tree.map(np.testing.assert_array_equal, action.draw(batch, KEY), draws)
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
