"""LeRobot datasets that the lerobot package wrote (fixtures/make_lerobot_v*.py), and damage."""

import hashlib
import io
import json
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_folders import rows, write_v2
from PIL import Image

from data_pipelines.episode import FrameReader
from data_pipelines.sources.formats import detect, open_dataset

FIXTURES = Path(__file__).parent / "fixtures"
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
NAMES = ("lerobot_v21", "lerobot_v30", "lerobot_v30_converted")
LENGTHS = (6, 9, 5)
FIRST = (0, 6, 15)
OPEN, CLOSE, WIPE = "open the drawer", "close the drawer – gently", "wipe the table"


def opened(path, **options):
    return open_dataset("lerobot", path, "drawers", "arm", options)


def data_file(root: Path, episode: int) -> Path:
    return sorted(root.glob("data/*/*.parquet"))[episode if "v21" in root.name else 0]


def rewrite(file: Path, **columns) -> None:
    """Replace columns of a parquet file; None takes one out."""
    table = pq.read_table(file)
    for key, values in columns.items():
        at = table.schema.get_field_index(key)
        table = table.remove_column(at)
        if values is not None:
            table = table.add_column(at, key, values)
    pq.write_table(table, file)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def copy(tmp_path):
    """copy("lerobot_v21", key=value) -> a dataset to break, with changes to its info.json."""

    def copy(name: str, **changes) -> Path:
        root = shutil.copytree(FIXTURES / name, tmp_path / name, dirs_exist_ok=True)
        file = root / "meta/info.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return root

    return copy


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
    assert more[0].instructions == (OPEN, "another wording 0") and not more[0].sections
    both = [(OPEN, "another wording 1"), (CLOSE, "another wording 1")]
    assert [section.instructions for section in more[1].sections] == both
    change = round(4 / 15 * 1e9)  # the fifth row
    assert [section.start for section in opened(FIXTURES / name)[1].sections] == [0, change]
    assert more[1].instructions_at(change - 1) == both[0]
    assert more[1].instructions_at(change) == both[1]
    with pytest.raises(ValueError, match=r"no features \['words', 'action'\] of strings or int"):
        opened(FIXTURES / name, texts=["words", "action"])


def test_integers_that_number_tasks_give_instructions_too(copy):
    key = "annotation.human.task"  # as GR00T names them
    features = json.loads((FIXTURES / "lerobot_v21/meta/info.json").read_text())["features"]
    root = copy("lerobot_v21", features=features | {key: features["gripper"]})
    file = data_file(root, 0)
    pq.write_table(pq.read_table(file).append_column(key, pa.array([2, 2, 1, 1, 1, 1])), file)
    episode = opened(root, texts=(key,))[0]
    assert episode.instructions == (OPEN, WIPE, CLOSE)
    assert [section.instructions for section in episode.sections] == [(OPEN, WIPE), (OPEN, CLOSE)]
    # None in two rows; with an axis, or as pandas stores integers with a gap.
    for column in ([[2], [-1], None, [2], [2], [2]], [2.0, np.nan, None, 2.0, 2.0, 2.0]):
        rewrite(file, **{key: pa.array(column)})
        episode = opened(root, texts=(key,))[0]
        assert episode.instructions == (OPEN, WIPE)
        assert episode.instructions_at(70_000_000) == (OPEN,)
    rewrite(file, **{key: pa.array([2, 2, 7, 2, 2, 2])})
    with pytest.raises(ValueError, match="task is 7, which meta/tasks does not have"):
        opened(root, texts=(key,))[0]
    rewrite(file, **{key: pa.array([[2, 1]] * 6)})  # which of the two?
    with pytest.raises(ValueError, match=r"task holds list<.* not texts"):
        opened(root, texts=(key,))[0]
    with pytest.raises(ValueError, match="nothing says which texts the integers of gripper"):
        opened(root, texts=("gripper",))


def test_subtasks_have_texts_of_their_own(tmp_path):
    """LeRobot 0.4: `subtask_index` numbers meta/subtasks.parquet, not the tasks."""
    integer = {"subtask_index": {"dtype": "int64", "shape": [1]}}
    column = {"subtask_index": [0, 0, 1, 1, -1, -1]}
    root = write_v2(
        tmp_path / "set",
        [6],
        table=lambda e, n, first: rows(e, n, first, **column),
        video=False,
        features=integer,
        tasks=("clear the table", "wipe it"),
    )
    with pytest.raises(ValueError, match=r"subtasks.parquet is missing.* texts of subtask_in"):
        opened(root, texts=("subtask_index",))
    texts = {"subtask": ["reach", "grasp"], "subtask_index": [0, 1]}
    pandas = json.dumps({"index_columns": ["subtask"]})
    table = pa.table(texts).replace_schema_metadata({"pandas": pandas})
    pq.write_table(table, root / "meta/subtasks.parquet")
    (episode,) = opened(root, texts=("subtask_index",))
    assert [(section.start // 10**8, *section.instructions) for section in episode.sections] == [
        (0, "clear the table", "reach"),
        (2, "clear the table", "grasp"),
        (4, "clear the table"),
    ]
    assert opened(root)[0].instructions == ("clear the table",)


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
    episode = opened(root)[0]
    assert episode.cameras == (WRIST,)
    assert "language_persistent" not in episode.streams
    assert "depth" in episode.left_out[FRONT] and "text" in episode.left_out["language_persistent"]


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


# Damage: each fault costs its own episodes, and is named.


def working(episodes, key=WRIST) -> list[int]:
    found = []
    for i in range(len(episodes)):
        try:
            episodes[i].streams[key].values.read([0])
        except (KeyError, ValueError):
            continue
        found.append(i)
    return found


def test_a_missing_or_broken_file_fails_its_episodes_only(copy):
    root = copy("lerobot_v21")
    data_file(root, 0).unlink()
    (root / f"videos/chunk-000/{FRONT}/episode_000001.mp4").unlink()
    episodes = opened(root)
    assert working(episodes) == [1, 2] and len(episodes) == 3
    with pytest.raises(ValueError, match=r"episode_000000\.parquet: .*No such file"):
        episodes[0]
    assert "there is no file by video_path" in episodes[1].left_out[FRONT]
    assert episodes[1].cameras == (WRIST,) and FRONT in episodes[2].streams
    data = data_file(FIXTURES / "lerobot_v21", 0).read_bytes()
    (root / "data/chunk-000/episode_000000.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"episode_000000\.parquet: not a readable parquet file"):
        episodes[0]


def test_a_truncated_shard_fails_its_episodes_only(copy):
    root = copy("lerobot_v30")
    for file, key in (
        (data_file(root, 0), WRIST),
        (root / f"videos/{FRONT}/chunk-000/file-000.mp4", FRONT),
    ):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert working(opened(root), key) == [2]
        if key == FRONT:
            assert "file-000.mp4: not a readable video" in opened(root)[0].left_out[FRONT]
        file.write_bytes(content)
    assert working(opened(root)) == working(opened(root), FRONT) == [0, 1, 2]


def test_a_video_that_is_shorter_than_its_rows_is_named_and_a_longer_one_cut(copy):
    root = copy("lerobot_v21")
    videos = root / "videos/chunk-000" / FRONT
    shutil.copy(videos / "episode_000000.mp4", videos / "episode_000001.mp4")
    shutil.copy(videos / "episode_000000.mp4", videos / "episode_000002.mp4")
    episodes = opened(root)
    assert re.search(r"001\.mp4: it has 6 of the 9 frames", episodes[1].left_out[FRONT])
    assert len(episodes[0].streams[FRONT].values) == 6 and not episodes[0].findings
    assert len(episodes[2].streams[FRONT].values) == 5
    assert "more frames than rows" in episodes[2].findings[0]


@pytest.mark.parametrize("lost", ["cut short", "not in UTF-8"])
def test_a_broken_line_in_the_list_of_episodes_fails_that_episode(copy, lost):
    root = copy("lerobot_v21")
    file = root / "meta/episodes.jsonl"
    lines = file.read_bytes().splitlines()
    lines[1] = lines[1][:40] if lost == "cut short" else lines[1].decode().encode("utf-16")
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    episodes = opened(root)
    assert len(episodes) == 3 and working(episodes) == [0, 2]
    with pytest.raises(ValueError, match=r"does not list episode 1 .*episodes\.jsonl line 2: "):
        episodes[1]


def test_a_lost_part_of_the_list_of_episodes_fails_those_episodes(copy):
    root = copy("lerobot_v30")
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(file)
    pq.write_table(rows.slice(0, 2), file)
    (file.parent / "file-001.parquet").write_bytes(b"PAR1 and then nothing")
    episodes = opened(root)
    assert [episodes[i].id for i in (0, 1)] == ["episode_000000", "episode_000001"]
    with pytest.raises(ValueError, match=r"does not list episode 2 of 3 .*file-001.*is damaged"):
        episodes[2]


def test_tasks_that_are_not_listed(name, copy):
    root = copy(name)
    (next(root.glob("meta/tasks.*"))).unlink()
    assert opened(root)[2].instructions == (WIPE,)  # the list of episodes says it too
    file = next((root / "meta").rglob("episodes.jsonl"), None)
    if file is None:
        file = root / "meta/episodes/chunk-000/file-000.parquet"
        pq.write_table(pq.read_table(file).drop_columns("tasks"), file)
    else:
        file.write_text(file.read_text(encoding="utf-8").replace("tasks", "t"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no text for the tasks \[2\] of episode 2 .*tasks\."):
        opened(root)[2]


def test_columns_that_contradict_the_metadata_are_named(copy):
    root = copy("lerobot_v21")
    rewrite(data_file(root, 0), gripper=None)
    assert "not in the file" in opened(root)[0].left_out["gripper"]
    short = pa.array([[1.0, 2.0]] * 9, pa.list_(pa.float32()))
    rewrite(data_file(root, 1), **{"observation.state": short})
    reason = opened(root)[1].left_out["observation.state"]
    assert reason == "its rows are [2], but meta/info.json says [3]"
    rewrite(data_file(root, 2), gripper=pa.array([1, None, 1, 0, 0]))
    assert opened(root)[2].left_out["gripper"] == "some of its values are missing"
    assert "action" in opened(root)[2].streams
    for column, message in {
        "timestamp": "timestamp: it holds string, not numbers",
        "episode_index": "episode_index holds string, not integers",
    }.items():
        root = copy("lerobot_v21")
        rewrite(data_file(root, 0), **{column: pa.array(["1"] * LENGTHS[0])})
        with pytest.raises(ValueError, match=rf"\.parquet: {message}"):
            opened(root)[0]


def test_times_that_do_not_go_on_are_named_with_their_file(copy):
    root = copy("lerobot_v21")
    for times, message in {
        (0.0, 1.0, 2.0, 2.0, 3.0): "timestamps must strictly increase",
        (0.0, 1.0, 2.0, np.nan, 3.0): "timestamp holds NaN",
    }.items():
        rewrite(data_file(root, 2), timestamp=pa.array(times, pa.float32()))
        with pytest.raises(ValueError, match=rf"000002\.parquet: {message}"):
            opened(root)[2]


def test_pictures_that_cannot_be_decoded_are_named(copy):
    root = copy("lerobot_v21")
    column = pq.read_table(data_file(root, 0))[WRIST].to_pylist()
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    column[1]["bytes"] = column[1]["bytes"][:200]
    column[2]["bytes"] = None
    Image.fromarray(np.zeros((12, 16), np.uint16)).save(depth := io.BytesIO(), "png")
    column[4]["bytes"] = depth.getvalue()
    rewrite(data_file(root, 0), **{WRIST: pa.array(column, kind)})
    pictures = opened(root)[0].streams[WRIST].values
    assert pictures.read([0, 3]).shape == (2, 12, 16, 3)
    with pytest.raises(ValueError, match=r"000000\.parquet: .*wrist: image 1: not a readable"):
        pictures.read([0, 1])
    with pytest.raises(ValueError, match=r"000000\.parquet: .*wrist: image 2 is not in the file"):
        pictures.read([2])
    with pytest.raises(ValueError, match=r"wrist: image 4: .* more than 8 bits"):
        pictures.read([4])
    with pytest.raises(IndexError, match="frame 6 asked for, but there are 6"):
        pictures.read([6])


def test_what_cannot_be_opened_says_why(copy, tmp_path):
    with pytest.raises(ValueError, match=r"LeRobot dataset v1\.6; v2\.0, v2\.1 and v3\.0 are sup"):
        opened(copy("lerobot_v21", codebase_version="v1.6"))
    for path, said in ((None, "has no video_path"), ("{camera}.mp4", "what ['camera'] stands for")):
        episode = opened(copy("lerobot_v21", video_path=path))[0]  # it costs the videos only
        assert said in episode.left_out[FRONT] and episode.cameras == (WRIST,)
    root = copy("lerobot_v30")
    rows = root / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(rows).slice(0, 0), rows)
    assert len(opened(root)) == 3 and working(opened(root)) == []
    rewrite(rows, episode_index=pa.array([], pa.string()))
    with pytest.raises(ValueError, match="not every episode_index is an integer"):
        opened(root)
    shutil.rmtree(root / "meta/episodes")
    with pytest.raises(ValueError, match="is incomplete: no parquet files under meta/episodes"):
        opened(root)
    (root / "meta/info.json").write_text('{"fps": 15,')
    with pytest.raises(ValueError, match=r"info\.json cannot be read \("):
        opened(root)
    (root / "meta/info.json").write_text('{"codebase_version": "v3.0", "fps": 15}')
    with pytest.raises(ValueError, match=r"info\.json must have features; data_path; total"):
        opened(root)
    (tmp_path / "lerobot_v21/meta/episodes.jsonl").unlink()
    shutil.copy(FIXTURES / "lerobot_v21/meta/info.json", tmp_path / "lerobot_v21/meta")
    with pytest.raises(ValueError, match=r"episodes\.jsonl is missing"):
        opened(tmp_path / "lerobot_v21")
