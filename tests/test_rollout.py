"""Closed-loop rollouts in simulator processes: Meta-World, and a toy that starts at once."""

import functools
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from toy_simulator import Fragile, Rail

from data_pipelines.video import VideoFile
from mvjax.evaluation.rollout import (
    EpisodeResult,
    RolloutError,
    append_result,
    read_results,
    run_rollouts,
)
from mvjax.evaluation.suites.metaworld import MetaWorld
from mvjax.policy.observation import ObservationSpec

SPEC = ObservationSpec(observed_frames=5, fps=20, proprio_horizon=2, proprio_fps=80, execute=8)
SMALL = functools.partial(MetaWorld, height=32, width=32)
EPISODES = [("drawer-close-v3", 1), ("window-open-v3", 1), ("drawer-close-v3", 2)]


@pytest.fixture
def metaworld():
    """Skips a test if Meta-World cannot render."""
    pytest.importorskip("metaworld", reason="Meta-World is not installed")
    try:
        simulator = MetaWorld("drawer-close-v3", 32, 32)
        simulator.reset(0)
        simulator.render("corner")
        simulator.close()
    except RuntimeError as error:
        pytest.skip(str(error))


class JaxFree(MetaWorld):
    """Fails if the worker has imported jax."""

    def reset(self, seed):
        assert "jax" not in sys.modules
        super().reset(seed)


class Pusher:
    """Lowers the hand and pushes, steered a little by the pictures; stores its observations."""

    def __init__(self):
        self.seen = []

    def __call__(self, observations):
        actions = np.zeros((len(observations), 16, 4), np.float32)
        for chunk, observation in zip(actions, observations):
            parts = (observation.frames[""], observation.proprio)
            digest = [hashlib.sha256(part.tobytes()).hexdigest() for part in parts]
            self.seen.append((observation.instruction, *digest))
            low = observation.proprio[-1, 2] < 0.1
            steer = observation.frames[""][-1].mean() % 1 - 0.5
            chunk[:] = [0.2 * steer, 1.0 if low else 0.0, 0.0 if low else -1.0, 0.0]
        return actions


def rollouts(folder, controller, episodes=EPISODES, **options):
    options = {"make_simulator": Rail, "max_steps": 100, "workers": 2} | options
    options = {"cameras": {"": "corner"}} | options
    return run_rollouts(
        suite="toy",
        episodes=episodes,
        controller=controller,
        spec=SPEC,
        folder=folder,
        config_hash="abc",
        **options,
    )


def outcomes(results):
    return [(r.task, r.seed, r.success, r.steps, r.queries) for r in results]


def test_results_do_not_depend_on_the_number_of_workers(metaworld, tmp_path):
    alone, together = Pusher(), Pusher()
    one = rollouts(tmp_path / "1", alone, make_simulator=SMALL, workers=1)
    two = rollouts(
        tmp_path / "2", together, make_simulator=functools.partial(JaxFree, height=32, width=32)
    )
    assert outcomes(one) == outcomes(two)
    assert sorted(alone.seen) == sorted(together.seen)  # every picture and state, bit for bit
    assert [(r.task, r.seed) for r in one] == EPISODES
    assert {r.success for r in one} == {True, False}
    for result in one:
        assert result.queries == -(-result.steps // SPEC.execute)
        assert result.steps == 100 or result.success
        assert result.mode == "policy" and result.plan_seconds > 0
    lines = (tmp_path / "2" / "results.jsonl").read_text().splitlines()
    assert {(json.loads(x)["task"], json.loads(x)["seed"]) for x in lines} == set(EPISODES)


def test_processes_share_the_episodes_and_end_with_one_table(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        halves = [
            pool.submit(rollouts, tmp_path / "2", "expert", workers=1, process=process, processes=2)
            for process in range(2)
        ]
        both = [outcomes(half.result()) for half in halves]
    alone = outcomes(rollouts(tmp_path / "1", "expert", workers=1))
    assert both == [alone, alone]
    lines = (tmp_path / "2" / "results_1.jsonl").read_text().splitlines()
    assert len(lines) == len(EPISODES) // 2
    assert sorted(outcomes(read_results(tmp_path / "2" / "results.jsonl"))) == sorted(alone)


def test_expert_and_none(tmp_path):
    episodes = [("push", 1), ("push", 2)]
    expert = rollouts(tmp_path / "expert", "expert", episodes, workers=1)
    assert all(r.success and r.queries == 0 and r.mode == "expert" for r in expert)
    none = rollouts(tmp_path / "none", "none", episodes, max_steps=40, workers=1)
    assert [(r.success, r.steps, r.mode) for r in none] == [(False, 40, "none")] * 2


def test_the_oracle_is_shown_what_the_expert_would_do(metaworld, tmp_path):
    futures = []

    def plan(observations):
        futures.extend(observations)
        return np.zeros((len(observations), 16, 4), np.float32)

    settings = dict(make_simulator=SMALL, max_steps=16, oracle_frames=8)
    oracle = rollouts(tmp_path, plan, EPISODES[:1], **settings)
    assert [(r.mode, r.queries) for r in oracle] == [("oracle", 2)]
    assert len(futures) == 2
    for observation in futures:
        future = observation.future[""]
        assert future.shape == (8, 32, 32, 3) and future.dtype == np.uint8
        # The future differs from the present frame: the expert moves.
        assert (future[-1] != observation.frames[""][-1]).any()


class Counting(Rail):
    """Says at the end of an episode how often each camera was drawn: by its instruction."""

    def render(self, camera):
        self.drawn = getattr(self, "drawn", Counter()) + Counter([camera])
        self.instruction = " ".join(f"{name} {n}" for name, n in sorted(self.drawn.items()))
        return super().render(camera)


def test_a_policy_sees_its_cameras_by_its_own_names(tmp_path):
    """In its order, also in recorded videos; each is drawn once, and only if a query reads it."""
    seen = []

    def plan(observations):
        seen.extend(observations)
        return np.zeros((len(observations), 16, 4), np.float32)

    cameras = {"images.hand": "gripper", "images.scene": "corner"}
    options = dict(cameras=cameras, max_steps=16, workers=1, make_simulator=Counting)
    rollouts(tmp_path / "policy", plan, [("push", 1)], **options)
    shapes = {"images.hand": (5, 16, 32, 3), "images.scene": (5, 32, 32, 3)}
    for observation in seen:
        assert [*observation.frames] == [*cameras] and observation.future is None
        assert {name: frames.shape for name, frames in observation.frames.items()} == shapes
        hand, scene = observation.frames.values()
        np.testing.assert_array_equal(hand[..., 0], scene[:, 8:24, :, 0])
        assert scene[..., 1].any() and not hand[..., 1:].any()
    # Of the steps 0 to 8, a query reads 0, 4 and 8.
    assert [each.instruction for each in seen] == ["corner 1 gripper 1", "corner 3 gripper 3"]

    seen.clear()
    oracle = options | dict(oracle_frames=8, predicted=["images.scene"], videos_per_task=1)
    (result,) = rollouts(tmp_path / "oracle", plan, [("push", 1)], **oracle)
    for observation in seen:
        (future,) = observation.future.values()
        assert [*observation.future] == ["images.scene"] and future.shape == (8, 32, 32, 3)
    film = VideoFile(tmp_path / "oracle" / result.video)
    assert len(film) == 5
    last = film.read([4])[0].astype(int)  # the hand's pictures are as high as the scene's
    assert last.shape == (32, 96, 3)
    red, white = last[..., 0] > 128, last[..., 1] > 128
    assert red[:, :64].any() and not white[:, :64].any() and white[:, 64:].any()


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_evaluation_goes_on_where_it_stopped(tmp_path, kill):
    episodes = [("push", seed) for seed in range(1, 41)]
    script = f"""
        from functools import partial
        from pathlib import Path
        from mvjax.evaluation.rollout import run_rollouts
        from mvjax.policy.observation import ObservationSpec
        from toy_simulator import Rail
        run_rollouts(suite="toy", make_simulator=partial(Rail, pause=0.004), episodes={episodes},
                     controller="expert", spec=ObservationSpec(5, 20, 2, 80, 8),
                     cameras={{"": "corner"}},
                     folder=Path({str(tmp_path)!r}), config_hash="abc", workers=2)
    """
    evaluating = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    path = tmp_path / "results.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert evaluating.poll() is None
        time.sleep(0.01)
    workers = _children(evaluating.pid)
    evaluating.send_signal(kill)
    assert evaluating.wait(30) != 0
    deadline = time.monotonic() + 20
    while any(map(_runs, workers)):
        assert time.monotonic() < deadline, "simulator processes were left behind"
        time.sleep(0.05)

    before = read_results(path)
    assert 3 <= len(before) < len(episodes)
    with path.open("a") as file:
        file.write('{"suite": "toy", "task": "pu')  # a line torn by the kill
    played = [(result.task, result.seed) for result in before]
    wanted = episodes[: len(before) + 2] + [
        e for e in played if e not in episodes[: len(before) + 2]
    ]
    results = rollouts(tmp_path, "expert", wanted, max_steps=None)
    after = read_results(path)
    assert after[: len(before)] == before  # kept, not played again
    assert sorted((r.task, r.seed) for r in after) == sorted(wanted)
    assert [(r.task, r.seed) for r in results] == wanted and all(r.success for r in results)


def _children(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return path.read_text().split() if path.exists() else []


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # as that of a zombie is
    except OSError:
        return False


def test_a_result_that_does_not_fit_on_the_disk_is_an_error(tmp_path):
    """A file system without room for a line takes its beginning, and no error is raised yet."""
    result = EpisodeResult("toy", "push", 1, True, 9, 1, 0.5, "policy", "abc", None)
    infinite = resource.RLIM_INFINITY
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, infinite))
        with pytest.raises(OSError, match="File too large"):
            append_result(tmp_path / "results.jsonl", result)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (infinite, infinite))


def test_results_of_another_configuration_are_not_mixed_in(tmp_path):
    task, seed = EPISODES[0]
    other = EpisodeResult("toy", task, seed, False, 1, 0, 0.0, "none", "abc", None)
    append_result(tmp_path / "results.jsonl", other)
    with pytest.raises(
        ValueError, match=r"holds results of .*'none', 'abc'.*'expert', 'abc'.*folder"
    ):
        rollouts(tmp_path, "expert", EPISODES[:1])


@pytest.mark.parametrize(("seed", "said"), [(7, "ended with exit code 3"), (8, "block fell off")])
def test_a_failing_simulator_is_named(tmp_path, seed, said):
    episodes = [("drawer-close-v3", 1), ("drawer-close-v3", seed)]
    with pytest.raises(RolloutError, match=f"(?s)drawer-close-v3, seed {seed}.*{said}"):
        rollouts(tmp_path, "expert", episodes, make_simulator=Fragile, workers=1)
    assert outcomes(read_results(tmp_path / "results.jsonl"))[0][:3] == ("drawer-close-v3", 1, True)


def test_wrong_policies_and_episodes_are_explained(tmp_path):
    with pytest.raises(ValueError, match=r"shape \[1, 4, 4\] .*at least 8"):
        rollouts(tmp_path, lambda o: np.zeros((len(o), 4, 4)), EPISODES[:1])
    with pytest.raises(ValueError, match="not finite"):
        rollouts(tmp_path, lambda o: np.full((len(o), 8, 4), np.nan), EPISODES[:1])
    with pytest.raises(ValueError, match="not 'human'"):
        rollouts(tmp_path, "human", EPISODES[:1])
    with pytest.raises(ValueError, match=r"'drawer-close-v3', 1.* is listed twice"):
        rollouts(tmp_path, "none", EPISODES[:1] * 2)


def test_recordings_are_playable_and_named_in_the_results(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    results = rollouts(tmp_path, "expert", EPISODES, videos_per_task=1)
    assert [r.video for r in results] == [
        "videos/drawer-close-v3_1.mp4",
        "videos/window-open-v3_1.mp4",
        None,
    ]
    for result in results[:2]:
        with av.open(str(tmp_path / result.video)) as file:
            frames = sum(1 for _ in file.decode(video=0))
            assert file.streams.video[0].average_rate == 20
        assert frames == -(-result.steps // 4) + 1  # 80 Hz drawn at 20 fps, and the end
