"""The Meta-World simulator; skipped without `metaworld` or a software OpenGL."""

import subprocess
import sys

import numpy as np
import pytest

from mvjax.evaluation.suites.metaworld import TASKS, MetaWorld
from mvjax.evaluation.suites.suite import versions, worker_versions

TASK = "drawer-open-v3"
SIZE = (64, 96)


@pytest.fixture(scope="module")
def simulator():
    try:
        simulator = MetaWorld(TASK, *SIZE)
        simulator.reset(0)
        simulator.render("corner")
    except (ModuleNotFoundError, RuntimeError) as error:
        pytest.skip(str(error))
    yield simulator
    simulator.close()


def noisy_steps(simulator, seed: int, steps: int, looks: tuple[int, ...] = ()) -> np.ndarray:
    """Observations and full physics states of an episode with noise on the expert's actions."""
    simulator.reset(seed)
    rng = np.random.default_rng(seed)
    states = []
    for step in range(steps):
        if step in looks:
            simulator.lookahead(24, 12, ["corner", "gripper"])
        simulator.step(simulator.expert_action() + rng.normal(0, 0.1, 4))
        data = simulator._env.data
        states.append(np.concatenate([simulator._obs, data.qpos, data.qvel, data.qacc_warmstart]))
    return np.stack(states)


def test_there_are_fifty_tasks_with_an_instruction_each(simulator):
    from metaworld.env_dict import ENV_CLS_MAP

    assert TASKS.keys() == ENV_CLS_MAP.keys()
    assert len(set(TASKS.values())) == 50
    assert simulator.instruction == "open the drawer"
    with pytest.raises(ValueError, match="unknown Meta-World task 'drawer-open'"):
        MetaWorld("drawer-open")


def test_versions_name_the_simulator_and_what_draws(simulator):
    import mujoco

    here, worker = versions("metaworld"), worker_versions("metaworld")
    assert here["mujoco"] == worker["mujoco"] == mujoco.__version__
    assert here["gl_renderer"] == worker["gl_renderer"] != ""
    assert not here["gl_renderer"].startswith("none")
    assert {"python", "metaworld", "gymnasium", "numpy", "gl_backend"} <= worker.keys()


def test_equal_seeds_give_equal_episodes_also_after_other_episodes(simulator):
    first = noisy_steps(simulator, seed=7, steps=15)
    picture = simulator.render("corner")
    noisy_steps(simulator, seed=3, steps=60)  # leaves the drawer open
    np.testing.assert_array_equal(noisy_steps(simulator, seed=7, steps=15), first)
    np.testing.assert_array_equal(simulator.render("corner"), picture)
    np.random.seed(0)  # placements must not come from numpy's global generator either
    simulator.reset(7)
    before = simulator.render("corner")
    simulator.reset(8)
    assert np.abs(simulator.render("corner").astype(int) - before).mean() > 0.1


def test_the_first_picture_shows_the_present_placement(simulator):
    import mujoco

    for seed in range(3):
        simulator.reset(seed)
        first = simulator.render("corner")
        mujoco.mj_forward(simulator._env.model, simulator._env.data)
        np.testing.assert_array_equal(simulator.render("corner"), first)
        np.testing.assert_array_equal(simulator._obs[:18], simulator._obs[18:36])


def test_pictures_are_upright(simulator):
    simulator.reset(0)
    picture = simulator.render("corner")
    assert picture.shape == (*SIZE, 3) and picture.dtype == np.uint8
    wall, table = picture[:6].reshape(-1, 3).astype(int), picture[-16:].reshape(-1, 3).astype(int)
    assert np.ptp(np.median(wall, 0)) < 20  # the grey wall is above
    assert (table[:, 0] - table[:, 2] > 15).mean() > 0.4  # the wooden table below
    robot = np.argwhere(picture[..., 0] > 2 * picture[..., 1].astype(int) + 40)
    assert robot[:, 1].mean() < SIZE[1] / 2  # the red arm stands on the left


def test_the_gripper_camera_moves_with_the_hand_and_looks_away_from_the_robot(simulator):
    """Over the drawer its handle, which is nearer to the robot, is below the box."""
    simulator.reset(0)
    for _ in range(30):
        simulator.step(simulator.expert_action())
    picture = simulator.render("gripper").astype(int)
    assert picture.shape == (*SIZE, 3)
    green = np.argwhere(picture[..., 1] > picture[..., 0] + 20)
    white = np.argwhere(picture.min(-1) > 200)
    assert green[:, 0].mean() + 8 < white[:, 0].mean()
    scene = simulator.render("corner").astype(int)
    for _ in range(8):
        simulator.step(np.array([0, 0, 1, 0]))
    moved, before = simulator.render("gripper"), picture
    changed = np.abs(simulator.render("corner") - scene).mean()
    assert np.abs(moved - before).mean() > 2 * changed > 0


def test_the_expert_solves_the_task_and_the_end_shows_in_the_picture(simulator):
    simulator.reset(1)
    before = simulator.render("corner")
    action = simulator.expert_action()
    assert action.dtype == np.float32 and action.shape == (4,) and np.abs(action).max() <= 1
    assert simulator.proprio().dtype == np.float32 and simulator.proprio().shape == (4,)
    assert any(simulator.step(simulator.expert_action()) for _ in range(150))
    assert np.abs(simulator.render("corner").astype(int) - before).mean() > 1
    with pytest.raises(AssertionError, match="size 4, got 3"):
        simulator.step(np.zeros(3))


def test_looking_ahead_leaves_the_episode_bit_identical(simulator):
    plain = noisy_steps(simulator, seed=5, steps=30)
    picture = simulator.render("corner")
    looked = noisy_steps(simulator, seed=5, steps=30, looks=(0, 4, 29))
    np.testing.assert_array_equal(looked, plain)
    simulator.lookahead(8, 4, ["corner"])
    np.testing.assert_array_equal(simulator.render("corner"), picture)


def test_looking_ahead_shows_what_the_expert_then_does(simulator):
    noisy_steps(simulator, seed=5, steps=20)
    future = simulator.lookahead(12, 4, ["gripper", "corner"])
    assert {camera: frames.shape for camera, frames in future.items()} == dict.fromkeys(
        ("gripper", "corner"), (3, *SIZE, 3)
    )
    for step in range(1, 13):
        simulator.step(simulator.expert_action())
        if step % 4 == 0:
            for camera, frames in future.items():
                np.testing.assert_array_equal(simulator.render(camera), frames[step // 4 - 1])
    assert simulator.lookahead(3, 4, ["corner"])["corner"].shape == (0, *SIZE, 3)


def test_episodes_may_be_longer_than_the_environments_own_limit(simulator):
    simulator.reset(0)
    for _ in range(501):
        simulator.step(np.zeros(4))


def test_the_camera_jitter_is_small_and_decided_by_both_seeds(simulator):
    simulator.reset(2)
    plain = simulator.render("corner").astype(int)
    pictures = {}
    for jitter_seed in (1, 2):
        jittered = MetaWorld(TASK, *SIZE, camera_jitter_seed=jitter_seed)
        for attempt in ("first", "again"):
            jittered.reset(2)
            pictures[jitter_seed, attempt] = jittered.render("corner").astype(int)
        jittered.close()
    np.testing.assert_array_equal(pictures[1, "first"], pictures[1, "again"])
    for jitter_seed in (1, 2):
        assert 0.5 < np.abs(pictures[jitter_seed, "first"] - plain).mean() < 25
    assert np.abs(pictures[1, "first"] - pictures[2, "first"]).mean() > 0.5


def test_no_jax_is_imported_and_a_missing_gl_says_what_to_install():
    script = (
        "import sys\n"
        "from mvjax.evaluation.suites.metaworld import MetaWorld\n"
        "try:\n"
        "    MetaWorld('door-open-v3')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        "print('jax' in sys.modules)\n"
    )
    pytest.importorskip("metaworld")
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={"MUJOCO_GL": "a-gl-that-does-not-exist", "PATH": "/usr/bin:/bin"},
    )
    assert "install a software OpenGL" in done.stdout, done.stderr
    assert "False" in done.stdout
