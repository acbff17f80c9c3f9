"""The recipes of DROID and ALOHA on small datasets that TFDS and lerobot wrote, against the truth.

tests/fixtures/make_droid.py and make_aloha.py made the datasets: every picture shows its step,
episode and camera, and every number tells them, too. The configurations are the real ones but for
sizes, paths and networks.
"""

from itertools import count
from pathlib import Path

import jax
import numpy as np
import pytest
from encode_toys import IDENTITY, TextEncoder, Tokenizer
from small_recipes import get_config, smaller
from tiny_stages import quick_compiles

from data_pipelines.inspect import inspect_path
from data_pipelines.sources.formats import open_config
from mvjax.encode import encode_dataset
from mvjax.experiment import Experiment
from mvjax.policy.load import load_policy
from mvjax.policy.robot import trained_robot
from mvjax.serving.adapters import make_adapter
from mvjax.serving.messages import RequestError
from mvjax.serving.notices import Notices
from mvjax.serving.session import Session, SessionSpec

OBSERVED, FUTURE = 5, 56


def encoded(config, path: Path):
    (dataset,) = config.datasets.values()
    return encode_dataset(
        open_config(dataset),
        dataset,
        config.clip,
        config.policy_io,
        Tokenizer(),
        TextEncoder(),
        path,
        identity=IDENTITY,
        batch_size=8,
        anchor_fps=dataset.anchor_fps,
        validation_share=0.0,
        max_bad_share=0.0,  # what a list leaves out is not bad
    )


def check_pictures(latents: np.ndarray, colours: np.ndarray) -> None:
    """Latents [t, h, w, 16] of the toy tokenizer against the colours of the frames [n, 3].

    The next step is 5 grey levels away, 0.039 here.
    """
    later = colours[1:].reshape(-1, 4, 3).mean(1)
    expected = np.concatenate([colours[:1], later]) / 127.5 - 1
    found = latents.astype(np.float32)[..., :3]
    assert found.shape[0] == len(expected)
    np.testing.assert_allclose(
        found, np.broadcast_to(expected[:, None, None], found.shape), atol=0.03
    )


def seen_steps(step: int, length: int, per_second: int) -> np.ndarray:
    """The steps that a clip shows: at 5 per second, up to the present and after it."""
    offsets = np.arange(1 - OBSERVED, FUTURE + 1) * (per_second // 5)
    return np.clip(step + offsets, 0, length - 1)


# DROID. The order of the episodes is that of TFDS, so they are told by their windows.

DROID_LENGTHS = (40, 20, 30, 24, 24)


def droid_colours(steps, episode: int, camera: int) -> np.ndarray:
    steps = np.asarray(steps)
    rest = np.broadcast_to([40 * episode + 20, 80 * camera + 20], (len(steps), 2))
    return np.concatenate([5 * steps[:, None] + 20, rest], axis=1)


def droid_numbers(steps, episode: int, what: int) -> np.ndarray:
    return 0.01 * np.asarray(steps)[:, None] + 0.1 * episode + what + 0.001 * np.arange(7)


def opened(steps) -> np.ndarray:
    """The gripper as 1 when open."""
    return 1 - (np.asarray(steps)[:, None] % 10) / 10


@pytest.fixture(scope="module")
def droid_records(tmp_path_factory):
    """Both stages of the recipe, at one window per step."""
    config = smaller("droid_video")
    config.datasets.droid.anchor_fps = 15.0
    return encoded(config, tmp_path_factory.mktemp("droid"))


def test_droid_windows_begin_where_the_lists_say(droid_records):
    """One failed, one has no instruction, one is not listed, and one is idle: one remains."""
    (row,) = (row for row in droid_records.episodes if row.count)
    anchors = [int(droid_records[i]["anchor"]) for i in range(len(droid_records))]
    steps = [*range(3, 20), *range(25, 40)]
    assert anchors == [round(step / 15 * 1e9) for step in steps] and row.count == len(steps)
    texts = {droid_records.instructions[i] for i in row.instructions}
    assert texts == {"put it in", "fill the cup"} == {*droid_records.instructions}
    assert droid_records.skipped == []
    said = {text: len(at) for text, at in droid_records.findings.items()}
    assert said == {
        "the episode failed, so success_only leaves it out": 1,
        "the episode has no instruction, so need_language leaves it out": 1,
        "ranges.json does not list the episode, so it is left out": 1,
        "ranges.json keeps no step of the episode: it is left out": 1,
    }


def test_droid_records_hold_the_cameras_joints_and_gripper_of_their_moment(droid_records):
    length = DROID_LENGTHS[0]
    for index in range(len(droid_records)):
        record = droid_records[index]
        step = round(int(record["anchor"]) * 15 / 1e9)
        shown = seen_steps(step, length, 15)
        check_pictures(record["latents"], droid_colours(shown, 0, camera=0))
        check_pictures(record["views/wrist"], droid_colours(shown[:OBSERVED], 0, camera=2))
        chunk = np.minimum(step + np.arange(45), length - 1)
        joints = droid_numbers(chunk, 0, what=2) - droid_numbers([step], 0, what=4)
        actions = np.concatenate([joints, opened(chunk)], axis=1)
        np.testing.assert_allclose(record["actions"], actions, atol=1e-5)
        proprio = np.concatenate([droid_numbers([step], 0, what=4), opened([step])], axis=1)
        np.testing.assert_allclose(record["proprio"], proprio, atol=1e-5)


def test_droid_takes_one_window_a_second_of_what_is_left(tmp_path):
    records = encoded(smaller("droid_action"), tmp_path)
    anchors = [int(records[i]["anchor"]) for i in range(len(records))]
    # A tenth of a second early, so that jitter loses none; 20 to 24 are idle.
    assert anchors == [round(step / 15 * 1e9) for step in (3, 17, 32)]


def test_inspection_counts_what_the_lists_leave_out():
    dataset = smaller("droid_video").datasets.droid
    found = inspect_path(Path(dataset.path), "rlds", dataset.options.to_dict())
    texts = [problem.text for problem in found.problems]
    assert sum("left out" in text or "leaves it out" in text for text in texts) == 4
    assert not any(problem.kind == "skipped by the encoding job" for problem in found.problems)


# ALOHA.

ALOHA_LENGTHS = (40, 25)
CAM_HIGH, CAM_LEFT, _, CAM_RIGHT = range(4)


def aloha_colours(frames, episode: int, camera: int) -> np.ndarray:
    frames = np.asarray(frames)
    rest = np.broadcast_to([100 * episode + 50, 60 * camera + 30], (len(frames), 2))
    return np.concatenate([5 * frames[:, None] + 20, rest], axis=1)


def aloha_numbers(frames, episode: int, what: int) -> np.ndarray:
    return 0.01 * np.asarray(frames)[:, None] + 0.5 * episode + what + 0.001 * np.arange(14)


@pytest.mark.parametrize("recipe", ["aloha_video", "aloha_action"])
def test_aloha_records_hold_three_cameras_and_both_arms_of_their_moment(recipe, tmp_path):
    records = encoded(smaller(recipe), tmp_path)
    assert [row.count for row in records.episodes] == [8, 5] and records.skipped == []
    assert records.instructions == [f"place the coffee capsule {i}" for i in range(2)]
    for index in range(len(records)):
        record, episode = records[index], int(index >= 8)
        length, frame = ALOHA_LENGTHS[episode], round(int(record["anchor"]) * 50 / 1e9)
        assert frame % 5 == 0  # ten windows a second
        shown = seen_steps(frame, length, 50)
        check_pictures(record["latents"], aloha_colours(shown, episode, CAM_HIGH))
        for view, camera in (("left_wrist", CAM_LEFT), ("right_wrist", CAM_RIGHT)):
            colours = aloha_colours(shown[:OBSERVED], episode, camera)
            check_pictures(record[f"views/{view}"], colours)
        present = aloha_numbers([frame], episode, what=1)
        np.testing.assert_allclose(record["proprio"], present, atol=1e-5)
        actions = aloha_numbers(np.minimum(frame + np.arange(150), length - 1), episode, what=3)
        joints = [*range(6), *range(7, 13)]
        actions[:, joints] -= present[:, joints]
        np.testing.assert_allclose(record["actions"], actions, atol=1e-5)


# Both.


def _compile_quickly() -> None:
    jax.config.update("jax_disable_most_optimizations", True)


STAGES = "video", "action"
_POSTED = {
    "droid": {
        "observation/exterior_image_1_left": 1,
        "observation/wrist_image_left": 2,
        "observation/joint_position": np.linspace(-1, 1, 7),
        "observation/gripper_position": np.array([0.25]),
    },
    "aloha": {
        "images": {"cam_high": 1, "cam_left_wrist": 2, "cam_right_wrist": 3},
        "state": np.linspace(-1, 1, 14),
    },
}


@pytest.mark.parametrize("name, client", [("droid", "droid_joint_position"), ("aloha", "aloha")])
def test_a_recipe_runs_from_the_dataset_to_the_robot(name, client, command, tmp_path):
    """By the commands of its head; openpi's message is answered with absolute joints."""
    video, action = (f"--config=tests/small_recipes.py:{name}_{s},{tmp_path}" for s in STAGES)
    for words in (
        ("launch.encode", video, "--only=tokenizer"),
        ("launch.encode", video),
        ("launch.train", video, f"--workdir={tmp_path}/video"),
        ("launch.train", action, f"--workdir={tmp_path}/action"),
    ):
        said = command(*words, prepare=_compile_quickly)
        assert said.code == 0, said.err
    with quick_compiles():
        experiment = Experiment.from_config(get_config(f"{name}_action,{tmp_path}"))
        policy = load_policy(experiment, tmp_path / "action", experiment.sampling(), 1)
        adapter = make_adapter(client, trained_robot(experiment.config))
        session = Session(adapter, SessionSpec(5, 1), count(), Notices({}, client))
        pictures = np.random.default_rng(0).integers(0, 256, (4, 180, 320, 3), np.uint8)
        message = jax.tree.map(lambda v: pictures[v] if isinstance(v, int) else v, _POSTED[name])
        seen = session.observe(message | {"prompt": "fill the cup"})
        (chunk,) = policy.act([seen.observation])
    actions = session.actions(chunk, seen)
    if name == "droid":  # whose gripper is 1 when closed
        joints = message["observation/joint_position"] + chunk[:, :7]
        expected = np.concatenate([joints, 1 - chunk[:, 7:]], axis=1)
        expected[:, 7] = expected[:, 7].clip(0, 1)
    else:
        expected = chunk + np.where(np.arange(14) % 7 < 6, message["state"], 0)
    np.testing.assert_allclose(actions, expected, atol=1e-5)
    assert (*seen.observation.frames,) == policy.cameras
    assert len(policy.views) == len(policy.cameras)
    shown = message.get("images", message)
    del shown[next(key for key in shown if "wrist" in key)]
    with pytest.raises(RequestError, match="wrist"):
        session.observe(message | {"prompt": "fill the cup"})
