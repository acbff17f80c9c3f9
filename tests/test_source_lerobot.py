"""LeRobot datasets, written by the lerobot package (tests/fixtures/make_lerobot_v*.py)."""

import hashlib
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_datasets import (
    CLOSE,
    FIRST,
    FIXTURES,
    FRONT,
    LENGTHS,
    NAMES,
    OPEN,
    WIPE,
    WRIST,
    copy_of,
    data_file,
    opened,
    rewrite,
)

from data_pipelines.episode import FrameReader
from data_pipelines.sources.formats import detect


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def copy(tmp_path):
    """copy("lerobot_v21", key=value) -> a dataset to break, with changes to its info.json."""
    return lambda name, **changes: copy_of(name, tmp_path, **changes)


def hashes(pictures) -> list[str]:
    return [hashlib.sha256(np.ascontiguousarray(picture)).hexdigest() for picture in pictures]


def test_every_version_is_read_as_lerobot_itself_reads_it(name):
    expected = np.load(FIXTURES / f"{name}.npz")
    episodes = opened(FIXTURES / name)
    assert detect(FIXTURES / name) == "lerobot"
    assert [episode.id for episode in episodes] == [f"episode_00000{i}" for i in range(3)]
    for i, length, first in zip((2, 0, 1), (5, 6, 9), (15, 0, 6)):
        episode, part = episodes[i], slice(first, first + length)
        assert (episode.source, episode.embodiment) == ("drawers", "arm")
        assert episode.cameras == (FRONT, WRIST)
        numbers = {"observation.state", "action", "gripper", "next.done"}
        numbers |= set() if "converted" in name else {"observation.tactile"}
        assert episode.streams.keys() == {FRONT, WRIST} | numbers
        times = np.round(np.arange(length) / 15 * 1e9).astype(np.int64)
        for key in numbers:
            read = episode.streams[key].values
            assert len(read) == length
            np.testing.assert_array_equal(episode.streams[key].timestamps, times)
            # One number per frame is a scalar to LeRobot, and has an axis here, as it says itself.
            lerobots = expected[key][part].reshape(read.shape)
            np.testing.assert_array_equal(read.astype(lerobots.dtype), lerobots, err_msg=key)
        action = episode.streams["action"].values
        assert action.dtype == np.float64
        np.testing.assert_array_equal(action, expected["written/action"][part])
        assert episode.streams["gripper"].values.dtype == np.int64
        assert episode.streams["gripper"].values.shape == (length, 1)
        assert episode.streams["next.done"].values.dtype == bool
        for key in (FRONT, WRIST):
            video = episode.streams[key]
            assert isinstance(video.values, FrameReader)
            assert np.abs(video.timestamps - times).max() <= 1
            pictures = video.values.read(range(length))
            assert hashes(pictures) == list(expected[key][part]), f"{key} of {i}"
            np.testing.assert_array_equal(video.values.read([3, 0, 3]), pictures[[3, 0, 3]])


def test_frames_are_those_that_pyav_decodes(name):
    files = sorted((FIXTURES / name).glob("videos/**/*.mp4"))
    frames = []
    for file in files:
        with av.open(str(file)) as container:
            frames += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    read = [episode.streams[FRONT].values for episode in opened(FIXTURES / name)]
    np.testing.assert_array_equal(np.concatenate([v.read(range(len(v))) for v in read]), frames)


def test_instructions_are_the_tasks_of_the_frames_as_they_begin(name):
    tasks = [episode.instructions for episode in opened(FIXTURES / name)]
    assert tasks == [(OPEN,), (OPEN, CLOSE), (WIPE,)]  # the metadata has some in another order
    lerobots = np.load(FIXTURES / f"{name}.npz")["task"]
    for i, first, length in zip(range(3), FIRST, LENGTHS):
        assert set(tasks[i]) == set(lerobots[first : first + length])
    more = opened(FIXTURES / name, texts=["language_instruction_2"])
    assert more[1].instructions == (OPEN, CLOSE, "another wording 1")
    with pytest.raises(ValueError, match=r"no features \['words', 'action'\] of texts or of int"):
        opened(FIXTURES / name, texts=["words", "action"])


def test_integers_that_number_tasks_give_instructions_too(copy):
    root = copy("lerobot_v21")
    rewrite(data_file(root, 0), gripper=pa.array([2, 2, 1, 1, 1, 1]))
    assert opened(root, texts=("gripper",))[0].instructions == (OPEN, WIPE, CLOSE)


def test_version_2_0_differs_in_the_statistics_only(copy):
    root = copy("lerobot_v21", codebase_version="v2.0")
    (root / "meta/episodes_stats.jsonl").rename(root / "meta/stats.json")
    assert [episode.instructions for episode in opened(root)] == [(OPEN,), (OPEN, CLOSE), (WIPE,)]


def test_an_opened_dataset_can_be_sent_to_another_process(name):
    episodes = opened(FIXTURES / name)
    frames = episodes[1].streams[FRONT].values.read([4])
    again = pickle.loads(pickle.dumps(episodes))
    np.testing.assert_array_equal(again[1].streams[FRONT].values.read([4]), frames)
    streams = pickle.loads(pickle.dumps(episodes[1])).streams
    np.testing.assert_array_equal(streams[FRONT].values.read([4]), frames)
    assert streams[WRIST].values.read([8]).shape == (1, 12, 16, 3)
    assert [episode.id for episode in again] == [episode.id for episode in episodes]


def test_several_threads_may_read_at_once(name):
    episodes = opened(FIXTURES / name)
    expected = dict(np.load(FIXTURES / f"{name}.npz"))  # the open file is for one thread

    def check(i: int) -> None:
        streams, part = episodes[i].streams, slice(FIRST[i], FIRST[i] + LENGTHS[i])
        np.testing.assert_array_equal(streams["action"].values, expected["written/action"][part])
        for key in (FRONT, WRIST):
            assert hashes(streams[key].values.read(range(LENGTHS[i]))) == list(expected[key][part])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, [2, 0, 1] * 10))


def test_depth_and_language_features_are_left_out(copy):
    root = copy("lerobot_v21")
    file = root / "meta/info.json"
    info = json.loads(file.read_text())
    info["features"][FRONT]["info"]["video.is_depth_map"] = True
    info["features"]["language_persistent"] = {"dtype": "language", "shape": [1], "names": None}
    file.write_text(json.dumps(info))
    assert opened(root)[0].cameras == (WRIST,)
    assert "language_persistent" not in opened(root)[0].streams


def test_an_episode_in_several_row_groups_is_read(copy):
    root, whole = copy("lerobot_v30"), opened(FIXTURES / "lerobot_v30")
    table = pq.read_table(data_file(root, 0))
    pq.write_table(table, data_file(root, 0), row_group_size=4, write_statistics=False)
    for i, episode in enumerate(opened(root)):
        for key in ("action", "observation.tactile", "next.done"):
            np.testing.assert_array_equal(
                episode.streams[key].values, whole[i].streams[key].values, err_msg=key
            )
        at = range(LENGTHS[i] - 1, -1, -1)
        expected = whole[i].streams[WRIST].values.read(at)
        np.testing.assert_array_equal(episode.streams[WRIST].values.read(at), expected)
