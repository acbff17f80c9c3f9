"""Chunks that continue the one being executed: the loss of given actions, the samples, a query."""

import itertools
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running_server import Running
from tiny_policy import random_observation, tiny_policy
from tiny_stages import tiny_config
from toy_simulator import Rail

from data_pipelines.vectors import parse
from mvjax.chunking import GUIDANCE, Pending, pending_weights
from mvjax.evaluation.closed_loop import settings_for
from mvjax.evaluation.rollout import read_results, read_setting, run_rollouts, write_setting
from mvjax.evaluation.worker import Job, _actions
from mvjax.experiment import Experiment
from mvjax.flow import Sampling, action_loss, euler_times, sample_actions
from mvjax.policy.observation import ObservationSpec
from mvjax.policy.robot import Robot
from mvjax.serving.adapters import make_adapter
from mvjax.serving.client import Client, Overlap, QueryRefused
from mvjax.serving.messages import RequestError
from mvjax.serving.notices import Notices
from mvjax.serving.session import DELAY, PENDING, Session, SessionSpec

pytestmark = pytest.mark.usefixtures("quickly")
SAMPLES, HORIZON, DIM, STEPS = 4, 8, 3, 5
RNG = np.random.default_rng(0)
ACTIONS, NOISE, OLD = RNG.normal(size=(3, SAMPLES, HORIZON, DIM)).astype(np.float32)
TIME = RNG.uniform(0.1, 0.9, (SAMPLES, 1)).astype(np.float32)
WEIGHT = RNG.normal(size=(DIM, DIM)).astype(np.float32)
COUNT, LATE = np.int32([0, 5, 8, 3]), np.int32([0, 2, 0, 3])
CONTINUED = Pending(OLD * (np.arange(HORIZON) < COUNT[:, None])[..., None], COUNT, LATE)


def test_given_actions_are_clean_and_not_learned():
    prefix, mask = np.int32([0, 3, 7, 8]), (RNG.random(ACTIONS.shape) < 0.7).astype(np.float32)
    given = np.arange(HORIZON) < prefix[:, None]
    seen = []

    def loss(weight, noise):
        def velocity(noisy, time):
            seen.append((noisy, time))
            return noisy @ weight + time[..., None]

        return action_loss(velocity, ACTIONS, noise, TIME, mask, prefix).sum()

    value, slope = jax.value_and_grad(loss)(WEIGHT, NOISE)
    other = np.where(given[..., None], 1e3, NOISE)  # the noise of given actions
    again = jax.value_and_grad(loss)(WEIGHT, other)
    np.testing.assert_array_equal(again[0], value)
    np.testing.assert_array_equal(again[1], slope)
    loss(WEIGHT, NOISE)
    noisy, time = map(np.asarray, seen[-1])
    np.testing.assert_array_equal(noisy[given], ACTIONS[given])
    np.testing.assert_array_equal(time, np.where(given, 0, TIME))
    # Of each sample the mean over what is neither given nor masked; the last one has nothing left.
    error = (noisy @ WEIGHT + time[..., None] - (NOISE - ACTIONS)) ** 2
    learned = mask * ~given[..., None]
    means = [(error[i] * learned[i]).sum() / max(learned[i].sum(), 1) for i in range(SAMPLES)]
    np.testing.assert_allclose(value, sum(means), rtol=1e-5)
    assert means[-1] == 0


def test_a_prefix_is_kept_to_the_last_bit_and_seen_clean():
    def velocity(noisy, time):
        assert time.shape == (SAMPLES, HORIZON)
        return jnp.cumsum(noisy, axis=1) @ WEIGHT + time[..., None]  # later ones see the first

    for dtype in (np.float32, jnp.bfloat16):  # the release's samples are bfloat16
        noise = jnp.asarray(NOISE, dtype)
        chunk = sample_actions(velocity, noise, STEPS, chunking="prefix", pending=CONTINUED)
        for i, delay in enumerate(LATE):
            np.testing.assert_array_equal(chunk[i, :delay], OLD[i, :delay])
    x, held = NOISE.copy(), (np.arange(HORIZON) < LATE[:, None])[..., None]
    for t in euler_times(STEPS):
        x = np.where(held, OLD, x)
        time = np.where(held, 0, t)
        v = np.cumsum(x / np.sqrt((1 - time) ** 2 + time**2), axis=1) @ WEIGHT + time
        x = x - v / STEPS
    ours = sample_actions(velocity, NOISE, STEPS, chunking="prefix", pending=CONTINUED)
    np.testing.assert_allclose(ours, np.where(held, OLD, x), rtol=1e-4, atol=1e-4)


def test_the_weights_fall_from_what_is_executed_to_what_is_known():
    weights = np.asarray(pending_weights(CONTINUED))
    for row, count, delay in zip(weights, COUNT, LATE):
        c = [(count - i) / (count - delay + 1) for i in range(delay, count)]
        falling = [c * (np.exp(c) - 1) / (np.e - 1) for c in c]
        expected = [1] * delay + falling + [0] * (HORIZON - count)
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-7)


def test_guidance_is_the_published_formula():
    """In the paper's time τ, from noise (0) to data (1), with a linear network's derivative."""

    def velocity(noisy, time):
        return noisy @ WEIGHT + time[..., None]

    ours = sample_actions(velocity, NOISE, STEPS, chunking="guided", pending=CONTINUED)
    a, weights = NOISE.astype(np.float64), np.asarray(pending_weights(CONTINUED))[..., None]
    for t in euler_times(STEPS).astype(np.float64):
        tau, std = 1 - t, np.sqrt((1 - t) ** 2 + t**2)
        v = -(a / std @ WEIGHT + t)
        a1 = a + (1 - tau) * v
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        weight = min(GUIDANCE, (1 - tau) / (tau * r2)) if tau > 1e-6 else GUIDANCE
        error = weights * (CONTINUED.actions - a1)
        slope = np.eye(DIM) - (1 - tau) * WEIGHT / std  # a1 of a
        a = a + (v + weight * error @ slope.T) / STEPS
    np.testing.assert_allclose(ours, a, rtol=2e-3, atol=2e-3)
    plain = sample_actions(velocity, NOISE, STEPS)
    np.testing.assert_allclose(ours[0], plain[0], rtol=1e-5, atol=1e-5)  # nothing is pending
    assert np.abs(ours - plain)[1:].max() > 0.1


@pytest.fixture(scope="module")
def policy():
    trained = tiny_policy(batch_size=3)[0]
    return replace(trained, model=replace(trained.model, prefix=2))


def continuing(policy, chunking, **sampling):
    return policy.sampled(replace(policy.model.sampling, chunking=chunking, draws=2, **sampling))


def asked(policy, delays):
    """Queries with three actions pending, in the units of the normalizer's data."""
    numbers = 0.5 * RNG.normal(size=(len(delays), 4, 4)).astype(np.float32)
    rest = policy.normalizer.unnormalize("actions", numbers)[:, :3]
    plain = [random_observation(seed) for seed in range(len(delays))]
    return plain, [
        replace(one, pending=old, delay=delay) for one, old, delay in zip(plain, rest, delays)
    ]


def test_queries_continue_what_is_executed_in_one_program_for_all_delays(policy):
    none = continuing(policy, "none")
    plain, queries = asked(policy, (0, 1, 2))
    today = none.act(plain)
    np.testing.assert_array_equal(none.act(queries), today)
    for chunking in ("prefix", "guided"):
        one = continuing(policy, chunking)
        before = one.model.act._cache_size()  # of all models: jit is the class's
        fresh = one.act(plain)  # the beginning of an episode
        np.testing.assert_allclose(fresh, today, rtol=1e-4, atol=1e-4)
        chunks = one.act(queries)
        np.testing.assert_allclose(one.act(queries[::-1])[::-1], chunks, rtol=1e-5, atol=1e-5)
        assert one.model.act._cache_size() == before + 1
        for chunk, query in zip(chunks[1:], queries[1:]):
            held, close = query.pending[: query.delay], chunk[: query.delay]
            if chunking == "prefix":
                np.testing.assert_allclose(close, held, rtol=1e-5, atol=1e-5)
        far, near = (np.square(c[2, :2] - queries[2].pending[:2]).mean() for c in (today, chunks))
        assert near < far
        assert np.abs(chunks - today)[1:].max() > 1e-3
    np.testing.assert_allclose(continuing(policy, "prefix").act(queries)[0], today[0], rtol=1e-4)


def test_levels_of_given_actions_are_those_of_their_own_times(policy):
    """What sampling computes once for all steps is what training sees: a time for every token."""
    model, rng = policy.model, np.random.default_rng(3)
    net = model.decoder.bind(policy.weights[2])
    shapes = (3, 1, 4), (3, 4, 4), (3, 6, model.decoder.config.context_dim)
    proprio, noisy, context = (rng.normal(size=s).astype(np.float32) for s in shapes)
    given = np.arange(4) < np.array([[0], [1], [3]])
    times = np.where(given, 0, 0.6).astype(np.float32)

    @jax.jit
    def both():
        levels = net.levels(jnp.float32([0.6]), jnp.float32(80), clean=True)
        one = jax.tree.map(lambda m: m[0], levels)._replace(given=given)
        return (
            net.at_levels(one, proprio, noisy, net.context_keys_values(context)),
            net(proprio, noisy, times, jnp.full((3, 1), 80.0), context),
        )

    np.testing.assert_allclose(*both(), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_continued_is_refused_by_name(policy):
    with pytest.raises(ValueError, match=r"trained with flow\.prefix = 0"):
        continuing(tiny_policy()[0], "prefix")
    with pytest.raises(ValueError, match="chunking must be one of none, prefix, guided"):
        continuing(policy, "smooth")
    prefix, guided = (continuing(policy, chunking) for chunking in ("prefix", "guided"))
    _, (query,) = asked(policy, (3,))
    with pytest.raises(ValueError, match=r"delay is 3 .* flow\.prefix = 2"):
        prefix.act([query])
    with pytest.raises(ValueError, match="delay is 4 actions, but 3 are pending"):
        guided.act([replace(query, delay=4)])
    with pytest.raises(ValueError, match=r"pending must be finite numbers \[n, 4\]"):
        guided.act([replace(query, pending=np.zeros((3, 2)))])


# --- In a simulator ---


def test_a_late_answer_takes_over_where_it_arrives():
    spec = ObservationSpec(1, 80, 1, 80, execute=4)

    def played(delay, steps):
        chunks = (100 * number + np.arange(8) for number in itertools.count())
        job = Job(Rail, replace(spec, delay=delay), "policy", {}, (), 0, None)
        return [*itertools.islice(_actions(None, job, lambda: next(chunks)), steps)]

    assert played(1, 14) == [0, 1, 2, 3, 4, 101, 102, 103, 104, 201, 202, 203, 204, 301]
    assert played(0, 9) == [0, 1, 2, 3, 100, 101, 102, 103, 200]
    with pytest.raises(ValueError, match="delay must be between 0 and execute = 4"):
        replace(spec, delay=5)


def test_queries_of_a_simulator_say_what_is_pending(tmp_path):
    last, units = {}, np.float32([2, 2, 2, 2])

    def policy(observations):
        chunks = []
        for seen in observations:
            episode, number = seen.noise_key
            if number:
                np.testing.assert_array_equal(seen.pending, last[episode][8:])
                assert seen.delay == 3
            else:
                assert seen.pending is None
            ahead = np.arange(16, dtype=np.float32)[:, None] * np.ones(4, np.float32)
            chunks.append(ahead + number)
            last[episode] = chunks[-1]
        return np.stack(chunks)

    (result,) = run_rollouts(
        suite="toy",
        make_simulator=Rail,
        episodes=[("push", 1)],
        controller=policy,
        spec=ObservationSpec(5, 20, 1, 80, execute=8, delay=3),
        cameras={"": "corner"},
        folder=tmp_path,
        config_hash="abc",
        convert=lambda chunk, proprio: 0 * chunk,  # the simulator's; the block stays where it is
        units=units,
        max_steps=30,
        workers=1,
    )
    # New chunks have 3 + number where old ones have 11 + number - 1: 7 too little, in units of 2.
    assert (result.queries, result.steps, result.jump) == (4, 30, 3.5)
    assert read_results(tmp_path / "results.jsonl") == [result]


def test_settings_with_a_delay_have_folders_labels_and_a_headline_of_their_own(tmp_path):
    (plain,) = settings_for("policy", [0], 10)
    assert plain == "policy_k0"
    several = settings_for("policy", [0], 10, delays=[0, 4], chunking="guided")
    assert [*several] == ["policy_k0_guided", "policy_k0_guided_delay4"]
    setting = several["policy_k0_guided_delay4"]
    assert setting.label == "stop after 0 of 10, guided chunks, delay 4" and not setting.main
    for setting in (*several.values(), *settings_for("policy", [0], 10).values()):
        write_setting(tmp_path, setting)
        assert read_setting(tmp_path) == setting
    assert "delay" not in (tmp_path / "setting.json").read_text()  # as earlier versions wrote it
    assert "chunking" not in Sampling().identity
    assert Sampling(chunking="guided").identity["chunking"] == "guided"


# --- Over a connection ---

PICTURE = np.zeros((4, 6, 3), np.uint8)


def message(state, **more):
    shown = {"observation/image": PICTURE, "observation/state": np.float32(state), "prompt": "go"}
    return shown | more


def session(adapter, chunking, longest_delay=2):
    spec = SessionSpec(1, 1, chunking=chunking, action_size=2, longest_delay=longest_delay)
    return Session(adapter, spec, itertools.count(), Notices({}, "client"))


def test_a_client_says_what_it_still_has_to_execute():
    adapter, rest = make_adapter("plain", Robot((), (), 2, 2)), np.float32([[1, 2], [3, 4], [5, 6]])
    one = session(adapter, "guided", 3)
    seen = one.observe(message([0, 0], **{PENDING: rest, DELAY: 3})).observation
    np.testing.assert_array_equal(seen.pending, rest)
    assert seen.delay == 3
    seen = one.observe(message([0, 0])).observation  # such as openpi's
    assert seen.pending is None and seen.delay == 0
    for wrong in (
        {PENDING: rest, DELAY: 4},
        {PENDING: rest[0]},
        {DELAY: 1},
        {PENDING: rest[:, :1]},
    ):
        with pytest.raises(RequestError, match="pending/"):
            one.observe(message([0, 0], **wrong))
    short = session(adapter, "prefix")
    assert short.observe(message([0, 0], **{PENDING: rest, DELAY: 3})).observation.delay == 2
    assert "only the first 2" in short.notices.take()[0]
    none = session(adapter, "none")
    assert none.observe(message([0, 0], **{PENDING: rest})).observation.pending is None
    assert "is not read" in none.notices.take()[0]


def test_a_servers_chunk_continues_what_its_client_sends():
    running = Running("tiny_policy", "sizes=1", "chunking=guided")
    try:
        seen = random_observation(1)
        query = {
            "observation/image_history": seen.frames,
            "observation/state": seen.proprio[0],
            "prompt": seen.instruction,
        }
        with Client(running.uri) as client:
            assert client.metadata["chunking"] == "guided"
            alone = client.infer(query)["actions"]
            left = alone[1:] + 0.5
            chunk = client.infer({**query, PENDING: left, DELAY: 2})["actions"]
            np.testing.assert_array_equal(client.infer(query)["actions"], alone)
            assert np.abs(chunk - alone)[0].max() > 0.01
            with pytest.raises(QueryRefused, match="between 0 and the 3 that are pending"):
                client.infer({**query, PENDING: left, DELAY: 4})
    finally:
        running.stop()


def test_relative_actions_are_expressed_from_the_present_state():
    part = dict(
        stream="action", represent="delta", base="state", columns=(0, 1), base_columns=(0, 1)
    )
    state = dict(stream="state", columns=(0, 1))
    robot = Robot(parse((part,), "action"), parse((state,), "proprio"), 2, 2)
    one = session(make_adapter("dataset", robot), "guided")
    chunk = np.float32([[1, 2], [3, 4]])
    then, now = (one.observe(message(state)) for state in ([10, 20], [11, 22]))
    actions = one.actions(chunk, then)
    np.testing.assert_array_equal(actions, [[11, 22], [13, 24]])
    later = one.observe(message([11, 22], **{PENDING: actions, DELAY: 1}))
    np.testing.assert_array_equal(later.observation.pending, [[0, 0], [2, 2]])
    np.testing.assert_array_equal(one.actions(later.observation.pending, now), actions)
    assert make_adapter("plain", robot).pending is None  # the server refuses to start


def test_a_moving_robot_sends_what_is_left_and_how_late_the_answer_was():
    sent = []

    def infer(observation):
        sent.append(observation)
        time.sleep(0.05)
        return {"actions": np.arange(8, dtype=np.float32)[:, None] + 10 * len(sent)}

    overlap = Overlap(infer, period=0.02)
    try:
        overlap.ask(0, {})
        first = [overlap.action(step)[0] for step in range(4)]
        overlap.ask(4, {})
        overlap.wait()
        assert first == [10, 11, 12, 13] and overlap.action(4 + 3)[0] == 23
    finally:
        overlap.close()
    assert sent[0] == {}
    np.testing.assert_array_equal(sent[1]["pending/actions"][:, 0], [14, 15, 16, 17])
    assert 3 <= sent[1]["pending/delay"] == overlap.delays[0] <= 4  # all that is left, at most


@pytest.mark.parametrize("stage", ["action", "joint"])
@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (dict(prefix=4), r"flow\.prefix is 4, but a chunk has 4 actions"),
        (dict(prefix=2, prefix_share=0.0), r"flow\.prefix is 2, but flow\.prefix_share is 0"),
    ],
)
def test_a_prefix_that_teaches_nothing_is_refused(stage, flow, message):
    config = tiny_config(stage)
    config.flow.update(flow)
    with pytest.raises(ValueError, match=message):
        Experiment.from_config(config)
