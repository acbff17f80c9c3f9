import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from data_pipelines.sources.bridge import open_bridge_raw, recognises

DATE = "rss/toykitchen2/set_table/00/2022-01-01_00-00-00"
STEPS = 6


def values(trajectory: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(trajectory)
    return {
        "state": rng.normal(size=(STEPS, 7)),
        "full_state": rng.normal(size=(STEPS, 7)),
        "desired_state": rng.normal(size=(STEPS, 7)),
        "eef_transform": rng.normal(size=(STEPS, 4, 4)),
        "qpos": rng.normal(size=(STEPS, 6)).astype(np.float32),
        "actions": rng.normal(size=(STEPS - 1, 7)),
    }


def times(trajectory: int) -> list[float]:
    return [1_640_000_000.5 + 0.2 * i + 0.01 * (i % 2) + trajectory for i in range(STEPS)]


def grey(camera: int, step: int) -> int:
    return 30 + 40 * camera + 20 * step


def write(root, trajectory: int, protocol: int = 4, text: bytes | None = None, cameras: int = 2):
    folder = root / DATE / f"raw/traj_group{trajectory // 2}/traj{trajectory}"
    folder.mkdir(parents=True)
    kept = values(trajectory)
    steps = [
        {"actions": a, "new_robot_transform": np.eye(4), "policy_type": "VRTeleopPolicy"}
        for a in kept.pop("actions")
    ]
    observed = kept | {
        "time_stamp": times(trajectory),
        "env_done": [False] * STEPS,
        "task_stage": 0,
    }
    (folder / "obs_dict.pkl").write_bytes(pickle.dumps(observed, protocol))
    (folder / "policy_out.pkl").write_bytes(pickle.dumps(steps, protocol))
    (folder / "agent_data.pkl").write_bytes(b"never read")
    if text is not None:
        (folder / "lang.txt").write_bytes(text)
    for camera in range(cameras):
        (folder / f"images{camera}").mkdir()
        for step in range(STEPS):
            picture = Image.fromarray(np.full((12, 16, 3), grey(camera, step), np.uint8))
            picture.save(folder / f"images{camera}/im_{step}.jpg")
    (folder / "depth_images0").mkdir()
    return folder


def open_it(path, **options):
    return open_bridge_raw(path, name="bridge", embodiment="widowx", **options)


@pytest.fixture
def tree(tmp_path):
    write(tmp_path, 0, text=b"put the pot on the stove\nconfidence: 1\n")
    write(tmp_path, 1, protocol=2, text="\ufefföffne die Tür\r\n".encode())
    write(tmp_path, 2, protocol=5)
    (tmp_path / DATE / "raw/traj_group0/notes.txt").write_text("x")
    return tmp_path


def test_folders_that_lie_elsewhere_are_followed_once(tree, tmp_path_factory):
    """As where a part of the dataset has moved to another disk."""
    ids = [episode.id for episode in open_it(tree)]
    site = tree / "rss"
    moved = tmp_path_factory.mktemp("disk") / "moved"
    site.rename(moved)
    site.symlink_to(moved)
    (moved / "toykitchen2/back").symlink_to(tree)  # which would never end
    (tree / "twice").symlink_to(moved)
    assert recognises(tree)
    assert [episode.id for episode in open_it(tree)] == ids


def test_trajectories_are_read_without_their_idle_first_step(tree):
    assert recognises(tree) and recognises(tree / DATE)
    episodes = open_it(tree)
    raw = f"{DATE}/raw"
    assert [e.id for e in episodes] == [
        f"{raw}/traj_group0/traj0",
        f"{raw}/traj_group0/traj1",
        f"{raw}/traj_group1/traj2",
    ]
    texts = ["put the pot on the stove", "öffne die Tür", ""]
    for number, episode in enumerate(episodes):
        assert (episode.source, episode.embodiment) == ("bridge", "widowx")
        assert episode.instructions == (texts[number],)
        assert episode.cameras == ("images0", "images1")
        at = np.round((np.array(times(number)) - times(number)[1])[1:] * 1e9).astype(np.int64)
        for key, expected in values(number).items():
            stream = episode.streams[key]
            assert stream.values.dtype == expected.dtype
            np.testing.assert_array_equal(stream.values, expected[1:])
            np.testing.assert_array_equal(stream.timestamps, at[: len(expected) - 1])
        for camera in range(2):
            stream = episode.streams[f"images{camera}"]
            np.testing.assert_array_equal(stream.timestamps, at)
            shown = stream.values.read([4, 0, 4])
            assert shown.shape == (3, 12, 16, 3) and shown.dtype == np.uint8
            expected = [grey(camera, s) for s in (5, 1, 5)]
            np.testing.assert_allclose(shown.mean((1, 2, 3)), expected, atol=1)
        for key, source in (("gripper_state", "full_state"), ("gripper_action", "desired_state")):
            expected = values(number)[source][1:, 6:].clip(0, 1)
            np.testing.assert_array_equal(episode.streams[key].values, expected)
    with pytest.raises(IndexError, match="frame 5 asked for, but there are 5"):
        episodes[0].streams["images0"].values.read([5])


def test_options_choose_the_cameras_and_the_times(tree):
    episode = open_it(tree, cameras=["images1"], fps=5)[2]
    assert episode.cameras == ("images1",) and "images0" not in episode.streams
    expected = np.arange(STEPS - 1) * 200_000_000
    np.testing.assert_array_equal(episode.streams["images1"].timestamps, expected)
    np.testing.assert_array_equal(episode.streams["actions"].timestamps, expected[:-1])
    for traj in ("traj_group0/traj0", "traj_group0/traj1"):
        rewrite(tree / DATE / "raw" / traj, "obs_dict.pkl", lambda d: d.pop("time_stamp") and d)
    untimed, timed = open_it(tree)[0], open_it(tree, fps=5)[0]
    assert "obs_dict.pkl does not say how many steps" in untimed.unknown_rate
    assert not timed.unknown_rate and not open_it(tree)[2].unknown_rate
    assert np.diff(untimed.streams["images1"].timestamps).tolist() == [10**9] * 4
    with pytest.raises(ValueError, match=r"traj0 has no images7, only \['images0', 'images1'\]"):
        open_it(tree, cameras=["images7"])[0]


LABELS = {  # lang.txt -> as stored, as the release keeps it
    "pick up the pot\nconfidence: 1\n": ("pick up the pot", "pick up the pot"),
    "confidence: 0.5\n": ("", ""),
    "pickup\nconfidence: 1\nlift the pot\nconfidence: 1": ("pickup", "lift the pot"),
    "the images did not load\nconfidence: 1": ("the images did not load", ""),
    "MOVE the pot ,left cardboard fence": (
        "MOVE the pot ,left cardboard fence",
        "move the pot, left",
    ),
    "put the  stuffedduck in the 4fbox": (
        "put the  stuffedduck in the 4fbox",
        "put the stuffed duck in the  cardboard box",
    ),
    "asdfg hjkl": ("asdfg hjkl", ""),
    "watch the matches": ("watch the matches", "watch the matches"),
    '"turn it clockwise90"': ('"turn it clockwise90"', "turn it clockwise 90 degrees"),
    "what is_this": ("what is_this", ""),
}


@pytest.mark.parametrize("text", LABELS)
def test_labels_are_taken_as_stored_or_as_the_release_repairs_them(tmp_path, text):
    write(tmp_path, 0, text=text.encode())
    for style, expected in zip(("stored", "release"), LABELS[text]):
        assert open_it(tmp_path, instruction_style=style)[0].instructions == (expected,)
    with pytest.raises(ValueError, match="instruction_style is 'clean'; choose from stored, rel"):
        open_it(tmp_path, instruction_style="clean")


def rewrite(folder, name, change):
    content = pickle.loads((folder / name).read_bytes())
    (folder / name).write_bytes(pickle.dumps(change(content)))


class Shell:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


FAULTS = {
    "no states": (lambda f: (f / "obs_dict.pkl").unlink(), "obs_dict.pkl is missing"),
    "cut pickle": (
        lambda f: (f / "obs_dict.pkl").write_bytes((f / "obs_dict.pkl").read_bytes()[:900]),
        r"obs_dict\.pkl: a damaged pickle",
    ),
    "times cut off": (
        lambda f: rewrite(f, "obs_dict.pkl", lambda d: d | {"time_stamp": [0.0, 0.2]}),
        "6 states, but not as many timestamps",
    ),
    "times stand still": (
        lambda f: rewrite(f, "obs_dict.pkl", lambda d: d | {"time_stamp": [0.0] * STEPS}),
        "timestamps must strictly increase.*The option fps",
    ),
    "times in milliseconds": (
        lambda f: rewrite(
            f, "obs_dict.pkl", lambda d: d | {"time_stamp": [2e5 * i for i in range(6)]}
        ),
        "2e.05 s apart; are the times in another unit than seconds",
    ),
    "states that were not fetched": (
        lambda f: (f / "obs_dict.pkl").write_text(POINTER),
        r"obs_dict\.pkl: it is a placeholder of Git LFS",
    ),
    "text that was not fetched": (
        lambda f: (f / "lang.txt").write_text(POINTER),
        r"lang\.txt: it is a placeholder of Git LFS",
    ),
    "no array": (
        lambda f: rewrite(f, "obs_dict.pkl", lambda d: d | {"full_state": [[1.0], [2.0, 3.0]]}),
        "full_state is not an array",
    ),
    "text in latin-1": (
        lambda f: (f / "lang.txt").write_bytes("öffne".encode("latin-1")),
        r"lang\.txt: not UTF-8 text \(byte 0 is 0xf6\)",
    ),
}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
LOST = {
    "no actions": (lambda f: (f / "policy_out.pkl").unlink(), "actions", "is missing"),
    "other actions": (
        lambda f: rewrite(f, "policy_out.pkl", lambda steps: 3),
        "actions",
        "expected steps with `actions`",
    ),
    "actions cut off": (
        lambda f: rewrite(f, "policy_out.pkl", lambda steps: steps[:2]),
        "actions",
        "2 actions of 6 states",
    ),
    "a picture missing": (
        lambda f: (f / "images1/im_2.jpg").unlink(),
        "images1",
        "im_2.jpg is missing",
    ),
    "the last picture missing": (
        lambda f: (f / "images1/im_5.jpg").unlink(),
        "images1",
        "5 pictures of 6 states",
    ),
    "pictures that were not fetched": (
        lambda f: (f / "images1/im_0.jpg").write_text(POINTER),
        "images1",
        "placeholder of Git LFS",
    ),
    "states cut off": (
        lambda f: rewrite(f, "obs_dict.pkl", lambda d: d | {"eef_transform": np.zeros((4, 4, 4))}),
        "eef_transform",
        "4 values of 6 states",
    ),
    "rows of several lengths": (
        lambda f: rewrite(f, "obs_dict.pkl", lambda d: d | {"qpos": [[1.0], [2.0, 3.0]]}),
        "qpos",
        "not an array",
    ),
    "other desired states": (
        lambda f: rewrite(f, "obs_dict.pkl", lambda d: d | {"desired_state": np.ones((6, 8))}),
        "gripper_action",
        r"no array `desired_state` \[t, 7\]",
    ),
}


@pytest.mark.parametrize("fault", LOST)
def test_a_part_that_is_broken_is_named_and_costs_nothing(tree, fault):
    damage, key, message = LOST[fault]
    whole = open_it(tree)[1]
    damage(tree / DATE / "raw/traj_group0/traj1")
    episode = open_it(tree)[1]
    assert set(whole.left_out) == {"task_stage"} and set(episode.left_out) == {"task_stage", key}
    assert re.search(message, episode.left_out[key]) and key not in episode.cameras
    assert episode.streams.keys() == whole.streams.keys() - {key}
    for name in ("full_state", "images0"):
        np.testing.assert_array_equal(*(e.streams[name].timestamps for e in (episode, whole)))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_trajectory_is_named_and_costs_only_itself(tree, fault):
    damage, message = FAULTS[fault]
    damage(tree / DATE / "raw/traj_group0/traj1")
    episodes = open_it(tree)
    assert len(episodes) == 3
    with pytest.raises(ValueError, match=f"traj1.*{message}"):
        episodes[1]
    assert episodes[0].id.endswith("traj0") and episodes[2].id.endswith("traj2")


def test_a_pickle_with_code_is_refused_and_not_run(tree):
    target = tree / "ran"
    file = tree / DATE / "raw/traj_group0/traj0/obs_dict.pkl"
    file.write_bytes(pickle.dumps({"full_state": Shell(f"touch {target}")}))
    with pytest.raises(ValueError, match=r"obs_dict\.pkl would call (posix|os)\.system"):
        open_it(tree)[0]
    assert not target.exists()


def test_a_damaged_picture_is_named_when_it_is_read(tree):
    file = tree / DATE / "raw/traj_group0/traj0/images0/im_3.jpg"
    file.write_bytes(file.read_bytes()[:200])
    frames = open_it(tree)[0].streams["images0"].values
    assert len(frames.read([0, 1])) == 2
    with pytest.raises(ValueError, match=r"im_3\.jpg: not a readable image"):
        frames.read([2])


def test_an_opened_dataset_can_be_sent_away_and_shared_by_threads(tree):
    episodes = pickle.loads(pickle.dumps(open_it(tree)))

    def level(i):
        return episodes[i % 3].streams["images1"].values.read([i % 5])[0].mean()

    with ThreadPoolExecutor(6) as threads:
        expected = [grey(1, i % 5 + 1) for i in range(30)]
        np.testing.assert_allclose(list(threads.map(level, range(30))), expected, atol=1)


def test_other_folders_are_not_taken_for_it(tmp_path):
    (tmp_path / "traj0").mkdir()
    assert not recognises(tmp_path)
    with pytest.raises(ValueError, match="has no folders traj_group<i>/traj<j>"):
        open_it(tmp_path)
