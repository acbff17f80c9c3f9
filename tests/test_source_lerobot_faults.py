"""Damaged LeRobot datasets: each fault costs its own episodes, and is named."""

import io
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_datasets import (
    FIXTURES,
    FRONT,
    LENGTHS,
    NAMES,
    WIPE,
    WRIST,
    copy_of,
    data_file,
    opened,
    rewrite,
)
from PIL import Image


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def copy(tmp_path):
    """copy("lerobot_v21", key=value) -> a dataset to break, with changes to its info.json."""
    return lambda name, **changes: copy_of(name, tmp_path, **changes)


def working(episodes) -> list[int]:
    found = []
    for i in range(len(episodes)):
        try:
            episodes[i].streams[WRIST].values.read([0])
        except ValueError:
            continue
        found.append(i)
    return found


def test_a_missing_or_broken_file_fails_its_episodes_only(copy):
    root = copy("lerobot_v21")
    data_file(root, 0).unlink()
    (root / f"videos/chunk-000/{FRONT}/episode_000001.mp4").unlink()
    episodes = opened(root)
    assert working(episodes) == [2] and len(episodes) == 3
    with pytest.raises(ValueError, match=r"episode_000000\.parquet: the rows of episode 0 are mis"):
        episodes[0]
    with pytest.raises(ValueError, match=r"episode_000001\.mp4: the video is missing"):
        episodes[1]
    data = data_file(FIXTURES / "lerobot_v21", 0).read_bytes()
    (root / "data/chunk-000/episode_000000.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"episode_000000\.parquet: not a readable parquet file"):
        episodes[0]


def test_a_truncated_shard_fails_its_episodes_only(copy):
    root = copy("lerobot_v30")
    for file in (data_file(root, 0), root / f"videos/{FRONT}/chunk-000/file-000.mp4"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert working(opened(root)) == [2]
        file.write_bytes(content)
    assert working(opened(root)) == [0, 1, 2]


def test_a_video_that_is_shorter_than_its_rows_is_named_and_a_longer_one_cut(copy):
    root = copy("lerobot_v21")
    videos = root / "videos/chunk-000" / FRONT
    shutil.copy(videos / "episode_000000.mp4", videos / "episode_000001.mp4")
    shutil.copy(videos / "episode_000000.mp4", videos / "episode_000002.mp4")
    episodes = opened(root)
    with pytest.raises(ValueError, match=r"001\.mp4: 6 of the 9 frames of episode 1 are there"):
        episodes[1]
    assert len(episodes[0].streams[FRONT].values) == 6
    assert len(episodes[2].streams[FRONT].values) == 5


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
    with pytest.raises(ValueError, match=r"000000\.parquet has no columns \['gripper'\]"):
        opened(root)[0]
    short = pa.array([[1.0, 2.0]] * 9, pa.list_(pa.float32()))
    rewrite(data_file(root, 1), **{"observation.state": short})
    with pytest.raises(ValueError, match=r"observation\.state should hold 27 numbers, .* has 18"):
        opened(root)[1]
    rewrite(data_file(root, 2), gripper=pa.array([1, None, 1, 0, 0]))
    with pytest.raises(ValueError, match=r"gripper should hold 5 numbers, .* but has 4"):
        opened(root)[2]
    for column, message in {
        "timestamp": "timestamp holds string, not numbers",
        "episode_index": "episode_index is no whole number",
    }.items():
        root = copy("lerobot_v21")
        rewrite(data_file(root, 0), **{column: pa.array(["1"] * LENGTHS[0])})
        with pytest.raises(ValueError, match=rf"\.parquet: {message}"):
            opened(root)[0]


def test_times_that_do_not_go_on_are_named_with_their_file(copy):
    root = copy("lerobot_v21")
    for times, message in {
        (0.0, 1.0, 2.0, 2.0, 3.0): "timestamps must strictly increase, but number 3",
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
    with pytest.raises(ValueError, match=r"000000\.parquet: .*wrist: picture 1: not a readable"):
        pictures.read([0, 1])
    with pytest.raises(ValueError, match=r"000000\.parquet: .*wrist: picture 2 is not in the file"):
        pictures.read([2])
    with pytest.raises(ValueError, match=r"wrist: picture 4: .* more than 8 bits"):
        pictures.read([4])
    with pytest.raises(IndexError, match="frame 6 asked for, but there are 6"):
        pictures.read([6])


def test_what_cannot_be_opened_says_why(copy, tmp_path):
    with pytest.raises(ValueError, match=r"LeRobot dataset v1\.6; v2\.0, v2\.1 and v3\.0 are read"):
        opened(copy("lerobot_v21", codebase_version="v1.6"))
    with pytest.raises(ValueError, match=r"info\.json must say .* video_path where there are"):
        opened(copy("lerobot_v21", video_path=None))
    root = copy("lerobot_v30")
    rows = root / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(rows).slice(0, 0), rows)
    assert len(opened(root)) == 3 and working(opened(root)) == []
    rewrite(rows, episode_index=pa.array([], pa.string()))
    with pytest.raises(ValueError, match="not every episode_index is a whole number"):
        opened(root)
    shutil.rmtree(root / "meta/episodes")
    with pytest.raises(ValueError, match="is not complete: no parquet files under meta/episodes"):
        opened(root)
    (root / "meta/info.json").write_text('{"fps": 15,')
    with pytest.raises(ValueError, match=r"info\.json is damaged \("):
        opened(root)
    (root / "meta/info.json").write_text('{"codebase_version": "v3.0", "fps": 15}')
    with pytest.raises(ValueError, match=r"info\.json must say fps, data_path, total_episodes"):
        opened(root)
    (tmp_path / "lerobot_v21/meta/episodes.jsonl").unlink()
    shutil.copy(FIXTURES / "lerobot_v21/meta/info.json", tmp_path / "lerobot_v21/meta")
    with pytest.raises(ValueError, match=r"episodes\.jsonl is missing"):
        opened(tmp_path / "lerobot_v21")
