import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.episode import Episode, FrameReader, Stream
from data_pipelines.sources.formats import open_dataset
from data_pipelines.video import write_video
from data_pipelines.writers import (
    RobotEpisode,
    VideoPart,
    frame_stats,
    vector_stats,
    write_lerobot,
    write_video_folder,
)

FPS = 30
CAMERA = "observation.images.top"
LENGTHS = (7, 12, 9, 5)
TASKS = ("pick up the cube", "open the drawer", "pick up the cube", "open the drawer")
FILES = ((0, 1), (2, 3))  # two episodes per video file


def frames(episode: int) -> list[np.ndarray]:
    """Each frame says in its grey level which one it is."""
    return [
        np.full((16, 32, 3), 20 * episode + 8 * i + 10, np.uint8) for i in range(LENGTHS[episode])
    ]


def level(picture: np.ndarray) -> float:
    return float(picture.astype(float).mean())


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    return [
        {
            "action": rng.normal(size=(n, 4)).astype(np.float32),
            "observation.state": rng.normal(size=(n, 3)).astype(np.float32),
        }
        for n in LENGTHS
    ]


@pytest.fixture(scope="module", params=[100.0, 1e-6], ids=["one data file", "a data file each"])
def dataset(request, tmp_path_factory, vectors):
    path = tmp_path_factory.mktemp("lerobot")
    episodes = []
    for number, members in enumerate(FILES):
        video = path / f"encoded-{number}.mp4"
        write_video(video, [f for e in members for f in frames(e)], FPS, crf=10)
        first = 0
        for e in members:
            part = VideoPart(video, first, frame_stats(frames(e)))
            episodes.append(RobotEpisode(TASKS[e], vectors[e], {CAMERA: part}))
            first += LENGTHS[e]
    root = path / "dataset"
    write_lerobot(
        root,
        episodes,
        fps=FPS,
        robot_type="arm",
        frame_size=(16, 32),
        data_file_mb=request.param,
    )
    return root


def test_what_was_written_is_read(dataset, vectors):
    episodes = open_dataset("lerobot", dataset, "cubes", "arm")
    assert len(episodes) == 4
    assert len({episode.id for episode in episodes}) == 4
    for number in (2, 0, 3, 1):
        episode = episodes[number]
        assert (episode.source, episode.embodiment) == ("cubes", "arm")
        assert episode.instructions == (TASKS[number],)
        assert episode.cameras == (CAMERA,)
        times = np.round(np.arange(LENGTHS[number]) / FPS * 1e9).astype(np.int64)
        for key, values in vectors[number].items():
            np.testing.assert_array_equal(episode.streams[key].values, values)
            np.testing.assert_array_equal(episode.streams[key].timestamps, times)
        video = episode.streams[CAMERA]
        assert isinstance(video.values, FrameReader)
        assert np.abs(video.timestamps - times).max() <= 1
        for i, picture in enumerate(video.values.read(range(LENGTHS[number]))):
            assert level(picture) == pytest.approx(level(frames(number)[i]), abs=2)
    assert episodes[-1].id == episodes[3].id
    with pytest.raises(IndexError):
        episodes[4]


def test_the_task_of_each_frame_is_written(tmp_path, vectors):
    video = tmp_path / "encoded.mp4"
    write_video(video, [*frames(0), *frames(1)], FPS, crf=10)
    texts = [TASKS[0]] * 3 + ["put it down"] * (LENGTHS[0] - 3)
    first = VideoPart(video, 0, frame_stats(frames(0)))
    second = VideoPart(video, LENGTHS[0], frame_stats(frames(1)))
    written = [
        RobotEpisode(texts, vectors[0], {CAMERA: first}),
        RobotEpisode(TASKS[1], vectors[1], {CAMERA: second}),
    ]
    about = dict(fps=FPS, robot_type="arm", frame_size=(16, 32))
    write_lerobot(tmp_path / "set", written, **about)
    episode, whole = open_dataset("lerobot", tmp_path / "set", "cubes", "arm")
    assert episode.instructions == (TASKS[0], "put it down") and not episode.findings
    times = episode.streams["action"].timestamps
    assert [episode.instructions_at(time) for time in times] == [(text,) for text in texts]
    assert whole.instructions == (TASKS[1],) and not whole.sections
    written[0] = RobotEpisode(texts[1:], vectors[0], {CAMERA: first})
    with pytest.raises(ValueError, match="instructions"):
        write_lerobot(tmp_path / "short", written, **about)


def test_an_opened_dataset_can_be_sent_to_another_process(dataset):
    episodes = pickle.loads(pickle.dumps(open_dataset("lerobot", dataset, "cubes", "arm")))
    picture = episodes[3].streams[CAMERA].values.read([4])[0]
    assert level(picture) == pytest.approx(level(frames(3)[4]), abs=2)


def test_the_layout_is_the_published_one(dataset, vectors):
    info = json.loads((dataset / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (4, 33, 2)
    assert info["data_path"] == "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    assert info["features"][CAMERA]["dtype"] == "video"
    assert info["features"][CAMERA]["shape"] == [16, 32, 3]
    assert info["features"]["action"]["shape"] == [4]
    assert info["features"]["task_index"] == {"dtype": "int64", "shape": [1], "names": None}

    # pandas finds the task's text as the index through this, and `tasks.iloc[i].name` is the text.
    tasks = pq.read_table(dataset / "meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    assert tasks["task_index"].to_pylist() == [0, 1]
    assert tasks["task"].to_pylist() == ["pick up the cube", "open the drawer"]

    rows = pq.read_table(dataset / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["length"] for row in rows] == list(LENGTHS)
    assert [row["dataset_from_index"] for row in rows] == [0, 7, 19, 28]
    assert [row["dataset_to_index"] for row in rows] == [7, 19, 28, 33]
    assert [row[f"videos/{CAMERA}/file_index"] for row in rows] == [0, 0, 1, 1]
    assert rows[1][f"videos/{CAMERA}/from_timestamp"] == pytest.approx(7 / FPS)
    assert rows[1][f"videos/{CAMERA}/to_timestamp"] == pytest.approx(19 / FPS)
    np.testing.assert_allclose(
        rows[2]["stats/action/mean"], vectors[2]["action"].mean(0), rtol=1e-5
    )

    schema = pq.read_schema(dataset / "data/chunk-000/file-000.parquet")
    assert schema.field("action").type == pa.list_(pa.field("item", pa.float32()), 4)
    assert schema.field("timestamp").type == pa.float32()


def test_the_statistics_are_those_of_all_rows(dataset, vectors):
    stats = json.loads((dataset / "meta/stats.json").read_text())
    actions = np.concatenate([v["action"] for v in vectors])
    whole = vector_stats(actions)
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(stats["action"][name], whole[name], rtol=1e-6, err_msg=name)
    pictures = np.concatenate([np.stack(frames(e)) for e in range(4)]) / 255
    assert np.shape(stats[CAMERA]["mean"]) == (3, 1, 1)
    np.testing.assert_allclose(np.ravel(stats[CAMERA]["mean"]), pictures.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(np.ravel(stats[CAMERA]["std"]), pictures.std((0, 1, 2)), rtol=1e-6)


def test_files_as_lerobot_itself_writes_them_are_read(dataset, tmp_path, vectors):
    """Variable lists, an index without a name, one row group per file, episodes in two files."""
    root = tmp_path / "copy"
    root.mkdir()
    (root / "videos").symlink_to(dataset / "videos")
    for file in sorted(dataset.glob("data/*/*.parquet")):
        table = pq.read_table(file)
        place = table.schema.get_field_index("action")
        listed = pa.array(table["action"].to_pylist(), pa.list_(pa.float32()))
        target = root / file.relative_to(dataset)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.set_column(place, "action", listed), target)
    tasks = pq.read_table(dataset / "meta/tasks.parquet")
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(
        tasks.rename_columns(["task_index", "__index_level_0__"]), root / "meta/tasks.parquet"
    )
    rows = pq.read_table(dataset / "meta/episodes/chunk-000/file-000.parquet").drop_columns("tasks")
    pq.write_table(rows.slice(0, 3), root / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(rows.slice(3), root / "meta/episodes/chunk-000/file-001.parquet")
    info = json.loads((dataset / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info))
    episodes = open_dataset("lerobot", root, "cubes", "arm")
    for number in range(4):
        streams = episodes[number].streams
        np.testing.assert_array_equal(streams["action"].values, vectors[number]["action"])
        assert episodes[number].instructions == (TASKS[number],)


def test_what_cannot_be_opened_says_why(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"has the format 'zarr'; supported are .*video_folder"):
        open_dataset("zarr", dataset, "a", "arm")
    with pytest.raises(ValueError, match="there is no folder"):
        open_dataset("lerobot", tmp_path / "nothing", "a", "arm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"it has no meta/info\.json"):
        open_dataset("lerobot", tmp_path / "empty", "a", "arm")
    with pytest.raises(ValueError, match=r"no \.mp4, .* files"):
        open_dataset("video_folder", tmp_path / "empty", "a", "human")
    (tmp_path / "empty/unfinished").mkdir()
    for format in ("lerobot", "video_folder"):
        with pytest.raises(ValueError, match="an unfinished recording"):
            open_dataset(format, tmp_path / "empty", "a", "arm")


def test_a_data_file_that_contradicts_the_episode_list_is_named(dataset, tmp_path):
    (tmp_path / "videos").symlink_to(dataset / "videos")
    (tmp_path / "meta").symlink_to(dataset / "meta")
    for file in dataset.glob("data/*/*.parquet"):
        target = tmp_path / file.relative_to(dataset)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(file).slice(2), target)
    episodes = open_dataset("lerobot", tmp_path, "cubes", "arm")
    with pytest.raises(
        ValueError, match=r"file-\d+\.parquet does not match meta/episodes: episode 0"
    ):
        episodes[0]


def test_video_folders_go_round(tmp_path):
    write_video(tmp_path / "raw.mp4", frames(1), FPS, crf=10)
    write_video_folder(tmp_path / "set", {"clip-a": (tmp_path / "raw.mp4", "a person waves")})
    (episode,) = open_dataset("video_folder", tmp_path / "set", "people", "human")
    assert episode.id == "clip-a"
    assert episode.instructions == ("a person waves",)
    assert len(episode.streams["video"].values) == LENGTHS[1]
    (tmp_path / "set/metas/clip-a.txt").unlink()
    with pytest.raises(ValueError, match=r"clip-a\.txt: .*No such file"):
        open_dataset("video_folder", tmp_path / "set", "people", "human")[0]


def test_streams_and_episodes_refuse_what_is_inconsistent():
    values = np.zeros((3, 4), np.float32)
    times = np.arange(3, dtype=np.int64)
    with pytest.raises(ValueError, match="3 timestamps and 2 values"):
        Stream(times, values[:2])
    with pytest.raises(
        ValueError, match="strictly increase, but number 1 is 1 ns and the next one 1 ns"
    ):
        Stream(np.array([0, 1, 1]), values)
    with pytest.raises(ValueError, match="must be int64 nanoseconds"):
        Stream(times / 1e9, values)
    with pytest.raises(ValueError, match=r"names the cameras \['top'\]"):
        Episode("a", "b", "c", ("d",), {"action": Stream(times, values)}, ("top",))
