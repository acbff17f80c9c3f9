"""The policy: its result, the independence of queries, and the cost of a query."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policy import tiny_policy
from toy_simulator import Rail

from data_pipelines.cameras import VIDEO, View
from mvjax.evaluation.rollout import run_rollouts
from mvjax.flow import (
    condition_mask,
    denoise,
    karras_sigmas,
    network_input,
    published_noise,
    sample_video,
    scale_noisy_actions,
    start,
)
from mvjax.policy.observation import Observation, ObservationSpec
from mvjax.policy.policy import VideoActionModel

pytestmark = pytest.mark.usefixtures("quickly")
EULER_STEPS = 4


@pytest.fixture(scope="module")
def policy():
    """A policy of random networks on 48x32 pixels (24 tokens)."""
    return variant(tiny_policy(batch_size=2)[0], action_steps=EULER_STEPS)


@functools.cache  # equal variants are one policy, which compiles its programs once
def variant(policy, batch_size=None, **sampling):
    sampled = policy.sampled(dataclasses.replace(policy.model.sampling, **sampling))
    return dataclasses.replace(sampled, batch_size=batch_size or policy.batch_size)


def observations(count, future=True):
    rng = np.random.default_rng(7)
    texts = ("open the drawer", "press the button", "close the door")
    return [
        Observation(
            frames=rng.integers(0, 256, (5, 48, 32, 3), np.uint8),
            proprio=rng.normal(size=(1, 4)).astype(np.float32),
            instruction=texts[i % 3],
            future=rng.integers(0, 256, (8, 48, 32, 3), np.uint8) if future else None,
            noise_key=("push/7", i),
        )
        for i in range(count)
    ]


def by_hand(policy, observation, draws=1):
    """Chunks of all draws from the formulas: noise to σ_K, partial pass, Euler; normalised."""
    model, (tokenizer, backbone, decoder) = policy.model, policy.weights
    sampling, clip = model.sampling, model.clip
    sigmas = karras_sigmas(sampling.video_steps, sigma_max=sampling.sigma_max)
    frames = observation.frames
    if sampling.oracle:
        frames = np.concatenate([frames, observation.future])
    known = tokenizer.encode(frames[None].astype(np.float32) / 127.5 - 1)
    clean = np.zeros((1, *clip.latent_shape), np.float32)
    clean[:, : known.shape[1]] = known
    text = policy.text_encoder.encode([observation.instruction])
    mask = condition_mask(jnp.full(1, 2), clip.latent_frames)
    sigma = jnp.full((1, 1), sigmas[sampling.stop_step])
    net, decoder = model.backbone.bind(backbone), model.decoder.bind(decoder)

    def denoiser(x, sigma):
        return denoise(lambda i: net(*i[:2], text, i[2]), x, clean, sigma, mask)

    @jax.jit
    def keys_values(noise):
        if sampling.oracle:
            x = clean + sigma * noise
        elif sampling.stop_step == 0:
            x = 80.0 * noise
        else:
            x = sample_video(denoiser, start(noise, sigmas), sigmas, last=sampling.stop_step).x
        i = network_input(x, clean, sigma, mask)
        context = net.hidden(*i[:2], text, i[2], layer=model.layer)
        return decoder.context_keys_values(context)

    kv = keys_values(published_noise(sampling.seed, clean.shape))
    proprio = policy.normalizer.normalize("proprio", observation.proprio[None])
    velocity = jax.jit(lambda a, t: decoder(proprio, scale_noisy_actions(a, t), t, sigma, kv))
    chunks = []
    for actions in published_noise(sampling.seed, (draws, 4, 4)):
        for step in range(sampling.action_steps):
            time = jnp.full((1, 1), 1 - step / sampling.action_steps)
            actions = actions - velocity(actions[None], time)[0] / sampling.action_steps
        chunks.append(actions)
    return np.stack(chunks)


@pytest.mark.parametrize(
    "sampling",
    [dict(stop_step=0, seed=3), dict(stop_step=2), dict(stop_step=1, oracle=True)],
    ids=["partial pass", "two evaluations first", "true future"],
)
def test_a_chunk_is_what_the_formulas_say(policy, sampling):
    policy = variant(policy, **sampling)
    first, second = observations(2)
    expected = policy.normalizer.unnormalize("actions", by_hand(policy, second))[0]
    np.testing.assert_allclose(policy.act([first, second])[1], expected, rtol=1e-4, atol=1e-4)


def test_every_input_matters(policy):
    first, second = observations(2)
    plain = policy.act([first])[0]
    for name in ("frames", "proprio", "instruction"):
        changed = dataclasses.replace(first, **{name: getattr(second, name)})
        assert np.abs(policy.act([changed])[0] - plain).max() > 1e-3, name
    # The future is the oracle's alone.
    without = dataclasses.replace(first, future=None)
    np.testing.assert_array_equal(policy.act([without])[0], plain)


def test_a_chunk_does_not_depend_on_its_batch(policy):
    queries = observations(5)
    two = variant(policy, fresh_noise=True)
    together = two.act(queries)
    assert together.shape == (5, 4, 4) and together.dtype == np.float32
    for i in (4, 0, 3):
        np.testing.assert_array_equal(two.act(queries[i : i + 1])[0], together[i])
    np.testing.assert_array_equal(two.act(queries[::-1]), together[::-1])
    three = variant(two, batch_size=3)
    np.testing.assert_allclose(three.act(queries), together, rtol=1e-5, atol=1e-5)


def test_fresh_noise_differs_between_queries_and_seeds(policy):
    queries = observations(2)
    fixed, fresh, other = (
        variant(policy, **s)
        for s in (dict(), dict(fresh_noise=True), dict(fresh_noise=True, seed=1))
    )
    noise = [
        np.asarray(p.inputs(queries, with_future=False).video_noise) for p in (fixed, fresh, other)
    ]
    np.testing.assert_array_equal(noise[0][0], noise[0][1])
    samples = [n[i] for n in noise for i in range(2)][1:]
    assert all(not np.array_equal(a, b) for i, a in enumerate(samples) for b in samples[:i])


def test_fresh_noise_follows_a_querys_name_and_not_its_bits(policy):
    """What is observed differs by roundings between batch sizes and machines; the name does not."""
    fresh, (query, other) = variant(policy, fresh_noise=True), observations(2)
    nudged = dataclasses.replace(query, proprio=np.nextafter(query.proprio, np.float32(9)))
    noise = fresh.inputs([query, nudged], with_future=False)
    for part in (noise.video_noise, noise.action_noise):
        np.testing.assert_array_equal(part[0], part[1])
    first = np.asarray(noise.video_noise[0]).ravel()[:4]
    assert not np.isin(np.asarray(noise.action_noise[0]), first).any()  # draws of their own
    names = [("push/7", 1), ("push/71", 0), ("push/8", 0), ("7 push", 0)]
    for name in names:
        pair = [query, dataclasses.replace(query, noise_key=name)]
        noise = fresh.inputs(pair, with_future=False).action_noise
        assert not np.array_equal(noise[0], noise[1]), name
    unnamed = dataclasses.replace(other, noise_key=None)
    with pytest.raises(ValueError, match="noise_key"):
        fresh.act([unnamed])
    policy.act([unnamed])  # the published noise needs no name


def test_an_episode_does_not_depend_on_workers_batches_or_a_resume(policy, tmp_path):
    """Every query's noise is the same, and so is every result, with fresh noise and four draws."""
    episodes = [(task, seed) for task in ("push", "shove") for seed in (1, 2, 3)]
    spec = ObservationSpec(observed_frames=5, fps=20, proprio_horizon=1, proprio_fps=80, execute=4)
    drawn = {}

    def play(folder, workers):
        one = variant(policy, batch_size=workers, fresh_noise=True, draws=4)
        noise = drawn.setdefault(folder, {})

        def act(queries):
            for batch in one.batches(queries):
                inputs = one.inputs(batch, with_future=False)
                for i, query in enumerate(batch):
                    parts = inputs.video_noise[i], inputs.action_noise[i]
                    noise[query.noise_key] = [np.asarray(part).tobytes() for part in parts]
            return one.act(queries)

        results = run_rollouts(
            suite="toy",
            make_simulator=Rail,
            episodes=episodes,
            controller=act,
            spec=spec,
            cameras={policy.cameras[0]: "corner"},
            folder=tmp_path / folder,
            config_hash="abc",
            max_steps=24,
            workers=workers,
        )
        return [(r.task, r.seed, r.success, r.steps, r.queries) for r in results]

    alone = play("one", 1)
    assert len(drawn["one"]) == sum(result[-1] for result in alone)
    assert len({video for video, _ in drawn["one"].values()}) == len(drawn["one"])
    for workers in (2, 5):
        assert play(str(workers), workers) == alone
        assert drawn[str(workers)] == drawn["one"]
    lines = (tmp_path / "5" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "results.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    assert play("killed", 2) == alone
    assert drawn["killed"].items() < drawn["one"].items()


def test_of_several_draws_the_most_central_is_taken(policy):
    first, second = observations(2)
    chunks = by_hand(policy, second, draws=4)
    distance = np.linalg.norm((chunks[:, None] - chunks).reshape(4, 4, -1), axis=-1)
    central = policy.normalizer.unnormalize("actions", chunks)[distance.sum(axis=0).argmin()]
    ours = variant(policy, draws=4).act([first, second])[1]
    np.testing.assert_allclose(ours, central, rtol=1e-4, atol=1e-4)


def test_nothing_compiles_after_the_first_query(policy):
    policy = variant(policy)
    policy.warm_up()
    compiled = VideoActionModel.act._cache_size()
    for count in (1, 2, 3, 5):
        policy.act(observations(count, future=False))
    assert VideoActionModel.act._cache_size() == compiled


def test_predicted_video_begins_with_what_was_observed(policy):
    queries = observations(3)
    video = policy.predict_video(queries)
    assert video.shape == (3, 13, 48, 32, 3) and video.dtype == np.uint8
    for ours, query in zip(video, queries):
        latents = policy.weights[0].encode(query.frames[None].astype(np.float32) / 127.5 - 1)
        coded = (np.asarray(policy.weights[0].decode(latents))[0] + 1) * 127.5
        np.testing.assert_allclose(ours[:5], np.clip(coded, 0, 255), atol=0.51)
    assert np.std(video[0, 5:].astype(float) - video[1, 5:].astype(float)) > 0


@pytest.mark.parametrize(
    "sampling",
    [dict(), dict(stop_step=2), dict(stop_step=1, oracle=True)],
    ids=["partial pass", "two evaluations first", "true future"],
)
def test_the_plan_and_the_video_are_of_one_trajectory(policy, sampling):
    """Equal to both alone, and no step of the schedule is computed twice."""
    both, queries = variant(policy, **sampling), observations(3)
    actions, video = both.act_with_video(queries)
    np.testing.assert_allclose(actions, both.act(queries), rtol=1e-6, atol=1e-6)
    alone = policy.predict_video(queries)
    np.testing.assert_allclose(video.astype(int), alone, atol=1)  # rounding
    assert np.mean(video != alone) < 1e-3
    inputs = both.inputs(queries[:2], with_future=both.model.sampling.oracle)
    traced = jax.make_jaxpr(VideoActionModel.act_and_predict.__wrapped__, static_argnums=0)(
        both.model, both.weights, inputs
    )
    evaluations = [
        scan.params["length"]
        for scan in traced.jaxpr.eqns
        if scan.primitive.name == "scan" and scan.outvars[0].aval.shape == inputs.video_noise.shape
    ]
    assert sum(evaluations) == policy.model.sampling.video_steps + 1


def context_products(jaxpr, tokens, inside_loop=False):
    """(outside, inside) the Euler loop: how many matrix products touch the context's tokens."""
    counts = np.zeros(2, int)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shapes = [v.aval.shape for v in equation.invars]
            counts[int(inside_loop)] += any(tokens in shape for shape in shapes)
        loop = inside_loop or equation.params.get("length") == EULER_STEPS
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    counts += context_products(inner, tokens, loop)
    return counts


def test_keys_and_values_of_the_context_are_computed_once(policy):
    """Inside the Euler loop only attention itself reads the context: q kᵀ and the weighted sum."""
    queries = observations(2)
    traced = jax.make_jaxpr(VideoActionModel.act.__wrapped__, static_argnums=0)(
        policy.model, policy.weights, policy.inputs(queries, with_future=False)
    )
    tokens = policy.model.clip.tokens
    assert tokens == 24  # no other length of this policy
    outside, inside = context_products(traced.jaxpr, tokens)
    assert inside == 2
    assert outside >= 2  # the keys and the values, and the backbone


@pytest.mark.parametrize("stop_step", [-1, 4])
def test_a_stop_step_that_does_not_exist_is_refused(policy, stop_step):
    with pytest.raises(ValueError, match=rf"between 0 and video_steps = 3, got {stop_step}"):
        variant(policy, stop_step=stop_step)


def test_a_tiled_policy_takes_frames_by_camera(policy):
    """Of any size; what a dataset is cut into is arranged already. Equal pictures, equal chunks."""
    clip, query = policy.model.clip, observations(1)[0]
    h, w = clip.height, clip.width
    rows = (("front", "wrist"),)
    tiled = dataclasses.replace(policy, views=(View(VIDEO, rows, h, w),))
    assert tiled.cameras == ("front", "wrist")
    cells = np.split(query.frames, 2, axis=2)
    frames = {name: cell.repeat(2, 1).repeat(3, 2) for name, cell in zip(tiled.cameras, cells)}
    by_camera = dataclasses.replace(query, frames=frames)
    arranged = dataclasses.replace(query, frames={VIDEO: query.frames}, arranged=True)
    expected = policy.act([query])
    for seen in (by_camera, arranged, dataclasses.replace(query, arranged=True)):
        np.testing.assert_array_equal(tiled.act([seen]), expected)
    small = dataclasses.replace(arranged, frames={VIDEO: query.frames[:, ::2]})
    for seen, words in (
        (query, "'front', 'wrist', but got the pictures of one camera that is not named"),
        (
            dataclasses.replace(query, frames={"front": query.frames}),
            "no pictures of 'wrist', only",
        ),
        (dataclasses.replace(query, frames=frames | {"top": frames["front"]}), "of 'top', too"),
        (
            dataclasses.replace(query, frames=frames | {"wrist": cells[0][0]}),
            r"'wrist' must be uint8",
        ),
        (dataclasses.replace(query, frames=frames | {"wrist": cells[0][1:]}), "equally many"),
        (small, rf"'video' are {h // 2}x{w}, but the model sees {h}x{w}"),
    ):
        with pytest.raises(ValueError, match=words):
            tiled.act([seen])


def test_observations_that_do_not_fit_are_refused(policy):
    query = observations(1)[0]
    short = dataclasses.replace(query, frames=query.frames[:1])
    with pytest.raises(ValueError, match=r"has 1 frames; .* clip.observed_frames = 5"):
        policy.act([short])
    for future in (None, query.future[:4]):
        with pytest.raises(ValueError, match=r"Oracle mode needs .* the 8 true future frames"):
            variant(policy, oracle=True).act([dataclasses.replace(query, future=future)])
    with pytest.raises(ValueError, match=r"'proprio' has shape \(2, 2, 4\)"):
        policy.act([dataclasses.replace(query, proprio=np.zeros((2, 4), np.float32))])
