"""LIBERO; skipped without its environment (`bash launch/libero.sh`) or its assets.

The simulator runs in its own Python: `libero_probe.py` measures there what is asserted here.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from configs import libero_small_action
from data_pipelines.embodiments import libero_panda
from data_pipelines.sources.formats import open_dataset
from data_pipelines.vectors import dims, parse, vector
from data_pipelines.writers import Demonstration, Scene, write_hdf5
from mvjax.evaluation import libero_demos
from mvjax.evaluation.libero_demos import moving_actions, regenerate
from mvjax.evaluation.rollout import run_rollouts
from mvjax.evaluation.suites.libero import Libero, axis_angle, libero_commands, libero_python
from mvjax.evaluation.suites.libero_scene import ASSETS_VARIABLE, max_steps, split_task, suite_tasks
from mvjax.evaluation.suites.suite import versions, worker_versions
from mvjax.policy.observation import ObservationSpec
from mvjax.serving.openpi_robots import EPISODE_JUMP_M

ROOT = Path(__file__).parent.parent
SPEC = ObservationSpec(observed_frames=5, fps=5, proprio_horizon=1, proprio_fps=20, execute=5)


@pytest.fixture(scope="module")
def python() -> str:
    """LIBERO's Python, where simulators can start."""
    try:
        python = str(libero_python())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if not Path(os.environ.get(ASSETS_VARIABLE, "?"), "scenes").is_dir():
        pytest.skip(f"{ASSETS_VARIABLE} does not name LIBERO's assets")
    return python


def run(python: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LP_NUM_THREADS": "1"}
    environment.setdefault("MUJOCO_GL", "egl")
    command = [python, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def facts(python, tmp_path_factory):
    out = tmp_path_factory.mktemp("libero") / "facts.npz"
    run(python, str(Path(__file__).with_name("libero_probe.py")), str(out))
    return np.load(out)


@pytest.fixture(scope="module")
def recorded(python, tmp_path_factory):
    """A demonstration of a task in LIBERO's HDF5 layout."""
    out = tmp_path_factory.mktemp("libero") / "hdf5"
    tasks = ["--tasks", "object-2", "--episodes", "1", "--workers", "1", "--size", "48x64"]
    command = ["-m", "launch.record", "--suite", "libero", "--kind", "hdf5"]
    run(sys.executable, *command, "--out", str(out), *tasks)  # starts LIBERO's Python itself
    return out


def test_an_arm_at_full_command_does_not_look_like_a_new_episode(facts):
    """The server detects episodes by jumps between queries; openpi's client executes 5 steps."""
    moved = {
        steps: np.linalg.norm(facts["pushed"][:, steps:] - facts["pushed"][:, :-steps], axis=2)
        for steps in (5, 8)
    }
    assert 0.1 < moved[5].max() < 0.13
    assert moved[8].max() < EPISODE_JUMP_M


def test_tasks_have_numbers_and_the_published_step_limits():
    assert suite_tasks("goal")[9] == "goal-9" and len(suite_tasks("90")) == 90
    limits = {suite: max_steps(f"{suite}-0") for suite in ("spatial", "object", "goal")}
    assert limits == {"spatial": 220, "object": 280, "goal": 300}
    assert split_task("10-7") == ("libero_10", 7)
    for wrong in ("spatial-10", "spatial", "kitchen-1", "spatial-x"):
        with pytest.raises(ValueError, match=f"unknown LIBERO task '{wrong}'"):
            split_task(wrong)


def test_a_policy_that_repeats_a_demonstration_sends_its_very_actions():
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (60, 7))
    actions[:, 6] = rng.choice([-1.0, 1.0], 60)
    chunk = vector(parse(libero_panda.HDF5_ACTION), {"actions": actions}, {}, 10)
    commands = libero_commands(chunk, np.zeros(10, np.float32))
    np.testing.assert_allclose(commands, actions, atol=1e-5)
    chunk[:, 9] *= 0.3  # an undecided gripper
    np.testing.assert_array_equal(libero_commands(chunk, np.zeros(10))[:, 6], actions[:, 6])


def quat2axisangle(quat):
    """robosuite 1.4, `utils/transform_utils.py`; openpi's LIBERO client has the same."""
    quat = np.array(quat)
    if quat[3] > 1.0:
        quat[3] = 1.0
    elif quat[3] < -1.0:
        quat[3] = -1.0
    den = np.sqrt(1.0 - quat[3] * quat[3])
    if math.isclose(den, 0.0):
        return np.zeros(3)
    return (quat[:3] * 2.0 * math.acos(quat[3])) / den


def test_recorded_rotations_go_on_beyond_pi_as_robosuites_do():
    axis = np.array([1, 0.05, 0.02]) / np.linalg.norm([1, 0.05, 0.02])
    angles = np.linspace(0.1, 2 * np.pi - 0.1, 500)
    path = [np.append(np.sin(a / 2) * axis, np.cos(a / 2)) for a in angles]
    path += [[0, 0, 0, 1], [0, 0, 0, -1], [0, 0, 0, 1 + 1e-9], [1, 0, 0, 0]]
    ours = np.array([axis_angle(np.array(q, float)) for q in path])
    np.testing.assert_array_equal(ours, [quat2axisangle(np.array(q, float)) for q in path])
    np.testing.assert_allclose(ours[:500], angles[:, None] * axis, atol=1e-7)
    # A policy with six numbers of rotation does not see the difference.
    six, folded = (
        vector(parse(libero_panda.LEROBOT_PROPRIO), {"observation.state": state}, {}, 10)
        for state in (
            np.concatenate([np.zeros((500, 3)), rotation, np.zeros((500, 2))], axis=1)
            for rotation in (ours[:500], Rotation.from_rotvec(ours[:500]).as_rotvec())
        )
    )
    np.testing.assert_allclose(six, folded, atol=1e-6)


def test_the_hand_turns_past_pi_without_a_jump(facts):
    """In the simulator itself, whose hand points down: half a turn is where it usually is."""
    quaternions, recorded = facts["turned"], facts["turned_recorded"]
    assert quaternions[..., 3].min() < -0.02 and quaternions[..., 3].max() > 0.02
    np.testing.assert_allclose(recorded, facts["turned_theirs"], atol=1e-6)
    assert np.abs(np.diff(recorded, axis=1)).max() < 0.2


def test_the_simulators_versions_are_those_of_its_own_python(python, monkeypatch):
    monkeypatch.setenv("MVJAX_LIBERO_PYTHON", python)
    found = worker_versions("libero")
    assert (found["robosuite"], found["hf-libero"]) == ("1.4.0", "0.1.4")
    assert found["numpy"].startswith("1.") and found["gl_renderer"]


def test_other_tasks_in_the_place_of_liberos_are_another_simulator(tmp_path, monkeypatch):
    """LIBERO-PRO is copied over LIBERO's files; and a package of a repository has its commit."""
    root = tmp_path / "libero/libero"
    for name in ("bddl_files/libero_goal/a.bddl", "init_files/libero_goal/a.pruned_init"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("(define (problem))")
    (tmp_path / "libero/__init__.py").touch()
    info = tmp_path / "hf_libero-0.1.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-libero\nVersion: 0.1.4\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = versions("libero")
    assert before["hf-libero"] == "0.1.4" and before == versions("libero")
    (root / "init_files/libero_goal/a.pruned_init").write_text("(define (moved))")
    moved = versions("libero")
    assert {k for k in before if before[k] != moved[k]} == {"tasks"}
    origin = {"url": "https://x/y", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}
    (info / "direct_url.json").write_text(json.dumps(origin))
    assert versions("libero")["hf-libero"] == "0.1.4 0123456789ab"


def test_actions_that_do_nothing_are_dropped_as_the_release_does():
    still, move = np.zeros(6), np.full(6, 0.1)
    rows = [(still, -1), (move, -1), (still, -1), (still, 1), (still, 1), (move, 1), (still, 1)]
    actions = np.array([[*motion, gripper] for motion, gripper in rows])
    np.testing.assert_array_equal(moving_actions(actions), actions[[1, 3, 5]])


def test_the_configurations_evaluate_by_the_release_protocol():
    config = libero_small_action.get_config("spatial")
    assert config.evaluation.tasks == suite_tasks("spatial")
    assert (config.evaluation.first_seed, config.evaluation.execute) == (0, 5)
    for io, description in (
        (config.policy_io.action, "action"),
        (config.policy_io.proprio, "proprio"),
    ):
        parts = parse(config.datasets.robot[description], description)
        assert dims(parts, io.dim) == (3, 6, 1) and io.fps == 20
    with pytest.raises(ValueError, match="unknown LIBERO suite 'kitchen'"):
        libero_small_action.get_config("kitchen")


def test_a_replay_of_other_demonstrations_is_refused(tmp_path, monkeypatch):
    """Files of the same names and another size, into a folder that is finished or was stopped."""

    def demonstrations(folder, seed):
        actions = np.random.default_rng(seed).normal(size=(4, 7))
        picture = {"agentview_rgb": np.zeros((4, 16, 16, 3), np.uint8)}
        demonstration = Demonstration(actions, picture, states=np.zeros((4, 2)))
        write_hdf5(folder / "lift_demo.hdf5", [demonstration], Scene("lift", "Lift"))
        return folder

    first, other = (demonstrations(tmp_path / str(seed), seed) for seed in (0, 1))

    def finished(out, *rest):
        (out / libero_demos.REPORT).write_text('[{"success": true}]')

    def stopped(out, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(libero_demos, "_regenerate_one", None)
    (tmp_path / "out" / "unfinished" / "lift_demo-demo_0").mkdir(parents=True)
    for assemble in (stopped, finished):
        monkeypatch.setattr(libero_demos, "_assemble", assemble)
        try:
            assert regenerate(first, tmp_path / "out", size=(48, 64)) == {"kept": 1, "failed": 0}
        except KeyboardInterrupt:
            pass
        with pytest.raises(ValueError, match=r"other demonstrations \(files\.lift_demo is "):
            regenerate(other, tmp_path / "out", size=(48, 64))
        with pytest.raises(ValueError, match=r"size is .48, 64. there, .480, 640. here"):
            regenerate(first, tmp_path / "out")
    assert regenerate(first, tmp_path / "out", size=(48, 64))["kept"] == 1
    # Two files of one name would be replayed into one place, and counted twice.
    with pytest.raises(
        ValueError, match=r"0/lift_demo\.hdf5 and .*1/lift_demo\.hdf5 hold the same task"
    ):
        regenerate(tmp_path, tmp_path / "another", size=(48, 64))


def test_states_are_those_of_liberos_own_environment(facts):
    np.testing.assert_array_equal(facts["state"], facts["official_state"])
    np.testing.assert_array_equal(facts["state_later"], facts["official_state"])
    # robosuite's observations are one substep, 2 ms, older than the state after set_init_state.
    np.testing.assert_allclose(facts["proprio"][:3], facts["official_position"], atol=1e-5)
    np.testing.assert_allclose(facts["quaternion"], facts["official_quaternion"], atol=1e-5)
    rotation = Rotation.from_quat(facts["official_quaternion"])
    np.testing.assert_allclose(facts["proprio"][3:9], rotation.as_matrix()[:2].ravel(), atol=1e-4)
    theirs = quat2axisangle(facts["official_quaternion"])
    np.testing.assert_allclose(facts["rotation"], theirs, atol=1e-4)
    np.testing.assert_allclose(facts["proprio"][9], facts["official_fingers"][0], atol=1e-4)
    assert str(facts["instruction"]) == "pick up the salad dressing and place it in the basket"
    assert int(facts["max_steps"]) == 280


def test_pictures_are_liberos_own_turned_by_180_degrees(facts):
    """They differ by shadows and smoothed edges alone."""
    for camera, official in (("picture", "official_picture"), ("wrist", "official_wrist")):
        ours, theirs = (facts[name].astype(float) for name in (camera, official))
        assert np.abs(ours - theirs).mean() < 6
        assert np.abs(ours[:, ::-1] - theirs).mean() > 15


def test_equal_seeds_give_equal_episodes_also_after_others_and_looks_ahead(facts):
    np.testing.assert_array_equal(facts["again"], facts["first"])
    np.testing.assert_array_equal(facts["with_looks"], facts["first"])
    assert np.abs(facts["other_seed"][0] - facts["first"][0]).max() > 1e-4
    assert np.abs(facts["drawn"][0] - facts["first"][0]).max() > 1e-3


def test_a_look_ahead_shows_what_the_expert_makes_happen(facts):
    assert facts["future"].shape == (3, 96, 128, 3)
    np.testing.assert_array_equal(facts["future"][-1], facts["came"])


def test_the_expert_succeeds_in_worker_processes_of_another_python(python, tmp_path):
    results = run_rollouts(
        suite="libero",
        make_simulator=Libero,
        episodes=[("object-2", 0), ("object-2", 1)],
        controller="expert",
        spec=SPEC,
        cameras={"": "agentview"},
        folder=tmp_path,
        config_hash="expert",
        workers=1,
        videos_per_task=1,
        interpreter=Path(python),
    )
    assert [result.success for result in results] == [True, True]
    assert (tmp_path / results[0].video).stat().st_size > 10_000


def test_a_policy_sees_the_release_history_and_its_actions_are_executed(python, tmp_path):
    seen = []

    def plan(observations):
        seen.extend(observations)
        chunk = np.tile(np.array([0.3, 0, 0, 1, 0, 0, 0, 1, 0, -1], "f4"), (60, 1))
        return np.stack([libero_commands(chunk, each.proprio[-1]) for each in observations])

    run_rollouts(
        suite="libero",
        make_simulator=Libero,
        episodes=[("object-2", 0)],
        controller=plan,
        spec=SPEC,
        cameras={"image": "agentview", "wrist_image": "wrist"},
        folder=tmp_path,
        config_hash="forward",
        max_steps=25,
        workers=1,
        interpreter=Path(python),
    )
    assert len(seen) == 5
    for camera in ("image", "wrist_image"):
        frames = [each.frames[camera] for each in seen]
        assert all(each.shape == (5, 480, 640, 3) for each in frames)
        assert (frames[0] == frames[0][-1]).all()  # padded by the first frame
        # Steps 0, 4, ..., 16 are what a query at step 16 would see; that at 20 sees 4, 8, ..., 20.
        assert (frames[4][-1] != frames[4][0]).any()
    forward = np.diff([each.proprio[-1, 0] for each in seen])
    assert (forward > 0.01).all()


def test_recordings_read_back_as_libero_files_and_play_again(recorded, python, tmp_path):
    (file,) = recorded.glob("*.hdf5")
    assert file.name == "pick_up_the_salad_dressing_and_place_it_in_the_basket_demo.hdf5"
    episodes = open_dataset("robomimic_hdf5", file, "libero", "libero_panda")
    assert len(episodes) == 1
    streams = episodes[0].streams
    assert streams["actions"].values.shape[1] == 7
    assert set(episodes[0].cameras) == {"obs/agentview_rgb", "obs/eye_in_hand_rgb"}

    out = tmp_path / "again"
    run(
        sys.executable,
        "-m",
        "launch.record",
        "--suite=libero",
        f"--regenerate={recorded}",
        "--out",
        str(out),
        "--size",
        "48x64",
        "--workers",
        "1",
    )
    report = json.loads((out / "regenerated.json").read_text())
    assert [row["success"] for row in report] == [True]
    again = open_dataset("lerobot", out, "libero", "libero_panda")
    assert again[0].instructions == ("pick up the salad dressing and place it in the basket.",)
    frames = again[0].streams["observation.images.agentview"].values
    assert frames.read([0]).shape == (1, 48, 64, 3)
    kept = moving_actions(streams["actions"].values)
    np.testing.assert_array_equal(again[0].streams["action"].values, kept.astype("f4"))
