"""LeRobot: what meta/ says, compared with the rows; and what cannot be read of them."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_folders import CAMERA, numbers, rows, shown, write_lines, write_v2, write_v3
from PIL import Image

from data_pipelines.sources.formats import open_dataset

LENGTHS = [8, 9, 7]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n"


def opened(root, **options):
    return open_dataset("lerobot", root, "set", "arm", options)


def check(root, findings=0) -> None:
    """Every episode has its own rows and frames, and so many findings."""
    episodes = opened(root)
    assert len(episodes) == len(LENGTHS)
    for e, episode in enumerate(episodes):
        assert episode.streams["action"].values[:, 0].tolist() == numbers(e, LENGTHS[e])
        assert shown(episode.streams[CAMERA]) == numbers(e, LENGTHS[e])
        assert len(episode.findings) == (findings[e] if findings else 0), episode.findings


# Files.


def test_the_rows_are_found_in_another_file_than_the_list_names(tmp_path):
    """In published LIBERO data; LeRobot itself looks for `episode_index` in all files."""
    stale = {"data/file_index": [0, 0, 7]}
    root = write_v3(tmp_path / "set", LENGTHS, files=[0, 1, 1], listed=stale)
    check(root, findings=[0, 1, 1])
    assert "found by episode_index" in opened(root)[1].findings[0]
    unlisted = write_v3(tmp_path / "null", LENGTHS, listed={"data/file_index": [0, None, 0]})
    check(unlisted, findings=[0, 1, 0])
    file = root / "data/chunk-000/file-001.parquet"
    whole = pq.read_table(file)
    pq.write_table(whole, file, write_statistics=False)
    check(root, findings=[0, 1, 1])
    pq.write_table(whole.slice(0, 12), file)  # the rest of the last episode in another file
    (root / "data/chunk-001").mkdir()
    pq.write_table(whole.slice(12), root / "data/chunk-001/file-000.parquet")
    check(root, findings=[0, 1, 1])
    pq.write_table(whole.slice(13), root / "data/chunk-001/file-000.parquet")
    with pytest.raises(ValueError, match=r"file-007\.parquet: .*No such file"):
        opened(root)[2]


def test_two_files_with_the_same_episode_are_no_answer(tmp_path):
    root = write_v3(tmp_path / "set", LENGTHS, listed={"data/file_index": [0, 5, 0]})
    data = root / "data/chunk-000"
    shutil.copy(data / "file-000.parquet", data / "file-001.parquet")
    episodes = opened(root)
    assert episodes[0].streams["action"].values[0, 0] == 0  # its named file has it
    with pytest.raises(ValueError, match="file-005"):
        episodes[1]


def test_folders_that_do_not_fit_chunks_size(tmp_path):
    root = write_v2(tmp_path / "set", LENGTHS, chunks_size=2)  # all are in chunk-000
    check(root, findings=[0, 0, 2])  # rows and video
    again = root / "data/chunk-007/episode_000002.parquet"
    again.parent.mkdir()
    shutil.copy(root / "data/chunk-000/episode_000002.parquet", again)
    with pytest.raises(ValueError, match=r"chunk-001.*002\.parquet: .*No such file"):
        opened(root)[2]


def test_rows_of_another_episode_than_the_name_says(tmp_path):
    root = write_v2(tmp_path / "set", LENGTHS)
    data = root / "data/chunk-000"
    shutil.copy(data / "episode_000002.parquet", data / "episode_000001.parquet")
    with pytest.raises(ValueError, match=r"000001.* no episode 1, but episodes 2 to 2"):
        opened(root)[1]
    pq.write_table(rows(0, 7), data / "episode_000000.parquet")
    with pytest.raises(ValueError, match="should have 8 rows, found 7"):
        opened(root)[0]


def test_numbers_of_the_list_that_contradict_the_rows(tmp_path):
    listed = {"dataset_from_index": [0, 8, 99]}
    root = write_v3(tmp_path / "set", LENGTHS, listed=listed)
    check(root, findings=[0, 0, 1])
    file = root / "meta/info.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps({**info, "total_episodes": 2.0}))
    check(root, findings=[1, 1, 2])
    file.write_text(json.dumps({**info, "total_episodes": 4}))
    with pytest.raises(ValueError, match="does not list episode 3 of 4"):
        opened(root)[3]
    twice = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").slice(1, 1)
    pq.write_table(twice, root / "meta/episodes/chunk-000/file-001.parquet")
    assert "lists the episode again" in opened(root)[1].findings[0]


def test_placeholders(tmp_path):
    per_episode = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/{episode_index}.mp4",
    }
    root = write_v2(tmp_path / "v3", LENGTHS)
    old = write_v3(tmp_path / "old", LENGTHS, video=False)
    shutil.copytree(old / "meta/episodes", root / "meta/episodes")
    shutil.copy(old / "meta/tasks.parquet", root / "meta")
    info = json.loads((root / "meta/info.json").read_text())
    changed = {**info, "codebase_version": "v3.0", **per_episode}
    (root / "meta/info.json").write_text(json.dumps(changed))
    for e in range(3):  # the files of version 2 with the list of version 3
        target = root / f"videos/{CAMERA}/{e}.mp4"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(root / f"videos/chunk-000/{CAMERA}/episode_{e:06d}.mp4", target)
    check(root, findings=[0, 1, 1])  # the list gives ranges of a common file
    for path, message in {
        "data/{episode_id}.parquet": r"data_path is .*\['episode_id'\]",
        "data/{}.parquet": r"data_path is .*\[''\]",
        "data/{episode_index.parquet": r"data_path is .*'}'",
    }.items():
        (root / "meta/info.json").write_text(json.dumps({**info, "data_path": path}))
        with pytest.raises(ValueError, match=message):
            opened(root)
    for path, message in {
        "data/{file_index:03d}.parquet": "data_path of .* has no .*data/file_index.* episode 0",
        "data/{episode_index:q}.parquet": "cannot be filled in",
    }.items():
        (root / "meta/info.json").write_text(json.dumps({**info, "data_path": path}))
        with pytest.raises(ValueError, match=message):
            opened(root)[0]


@pytest.mark.parametrize("name", ["info.json", "episodes.jsonl", "tasks.jsonl", "data", "video"])
def test_placeholders_of_git_lfs_are_named(tmp_path, name):
    root = write_v2(tmp_path / "set", LENGTHS)
    listed = root / "meta/episodes.jsonl"
    if name == "tasks.jsonl":
        listed.write_text(listed.read_text().replace('"tasks"', '"t"'))
    for file in root.rglob({"data": "*.parquet", "video": "*.mp4"}.get(name, name)):
        file.write_bytes(POINTER)
    if name == "video":
        assert "git lfs pull" in opened(root)[0].left_out[CAMERA]
        return
    with pytest.raises(ValueError, match="git lfs pull"):
        opened(root)[0]


# Tasks.


def as_frame(index=(), **columns):
    """A table as pandas writes a data frame with these index columns."""
    about = {"index_columns": list(index), "columns": [], "column_indexes": []}
    return pa.table(columns).replace_schema_metadata({"pandas": json.dumps(about)})


@pytest.mark.parametrize(
    "tasks",
    [
        as_frame(["task"], task_index=[0, 1], task=["pick", "place"]),
        as_frame(["__index_level_0__"], task_index=[0, 1], __index_level_0__=["pick", "place"]),
        pa.table({"task_index": [0, 1], "__index_level_0__": ["pick", "place"]}),
        as_frame(["task"], task_index=[1, 0], task_name=["t1", "t0"], task=["place", "pick"]),
        as_frame(task_index=[0, 1], category=["c0", "c1"], task=["pick", "place"]),
        as_frame(["name"], category=["c0", "c1"], task_index=[0, 1], name=["pick", "place"]),
        as_frame(
            ["__index_level_0__"], task=["pick", "place"], task_index=[0, 1],
            __index_level_0__=[3, 5],
        ),
        as_frame(["task"], subtask_index=[7, 8], task_index=[0, 1], task=["pick", "place"]),
        pa.table(
            {"task_index": [0, 1], "task": pa.array(["pick", "place"]).dictionary_encode()}
        ),
        pa.table({"task": [0, 1], "task_index": [0, 1], "__index_level_0__": ["pick", "place"]}),
    ],
)  # fmt: skip
def test_the_text_of_a_task_is_its_column_or_the_index_of_pandas(tmp_path, tasks):
    episode = opened(write_v3(tmp_path / "set", LENGTHS, tasks=tasks, video=False))[0]
    assert episode.instructions == ("pick",) and not episode.findings


@pytest.mark.parametrize(
    "tasks",
    [
        pa.table({"task_index": [0, 1], "category": ["c0", "c1"]}),
        as_frame(["a", "b"], task_index=[0, 1], a=["x", "y"], b=["pick", "place"]),
        pa.table({"task": ["pick", "place"]}),
    ],
)
def test_no_other_column_is_taken_for_the_text(tmp_path, tasks):
    root = write_v3(tmp_path / "a", LENGTHS, tasks=tasks, video=False)
    with pytest.raises(ValueError, match=r"no text for the tasks .*tasks\.parquet has the columns"):
        opened(root)[0]
    listed = {"tasks": [["pick"]] * 3}
    episode = opened(write_v3(tmp_path / "b", LENGTHS, tasks=tasks, listed=listed, video=False))[0]
    plain = {"tasks": ["pick"] * 3}
    other = opened(write_v3(tmp_path / "c", LENGTHS, tasks=tasks, listed=plain, video=False))[0]
    assert other.instructions == ("pick",)
    assert episode.instructions == ("pick",) and "of meta/episodes was taken" in episode.findings[0]


def test_tasks_that_contradict_each_other(tmp_path):
    root = write_v2(tmp_path / "set", LENGTHS, video=False)
    listed, tasks = root / "meta/episodes.jsonl", root / "meta/tasks.jsonl"

    def write(texts, *described):
        lines = [{"episode_index": e, "length": n, "tasks": texts} for e, n in enumerate(LENGTHS)]
        write_lines(listed, lines)
        write_lines(tasks, described)
        with tasks.open("a") as file:
            file.write("\n  \n")
        return opened(root)

    pick = {"task_index": 0, "task_name": "picking", "task": "Pick the cup."}
    assert write(["Pick  the cup"], pick)[0].findings == ()  # another spelling
    assert write(["picking"], pick)[0].findings == ()  # its name
    assert write(["picking"], pick)[0].instructions == ("Pick the cup.",)
    episode = write(["Pick the cup.", "valid"], pick)[0]
    assert episode.instructions == ("Pick the cup.",) and "tasks of meta" in episode.findings[0]
    with pytest.raises(ValueError, match=r"stands for .*Pick the cup.* lists \['place the cup'\]"):
        write(["place the cup"], pick)[0]
    assert write([0], pick)[0].findings == write("picking", pick)[0].findings == ()
    blank = {"task_index": 0, "task": " "}
    assert write([""], blank)[0].instructions == write([], blank)[0].instructions == ("",)
    assert write(["pick"], blank)[0].instructions == ("pick",)
    assert write([""], pick)[0].instructions == (pick["task"],)
    with pytest.raises(ValueError, match="several texts for task_index 0"):
        write([], pick, {"task_index": 0, "task": "Place the cup."})[0]
    assert write([], pick, pick, {"task_index": 1, "task": "x"})[0].instructions == (pick["task"],)
    with pytest.raises(ValueError, match="no text for the tasks"):
        write([], {"task_index": 0, "task_name": "picking"})[0]
    with pytest.raises(ValueError, match="says which rows they belong to"):
        write(["a", "b"])[0]


def test_a_task_without_a_text_costs_its_episode(tmp_path):
    def table(e, n, first):
        return rows(e, n, first, task_index=np.where(np.arange(n) < 4, 0, e))

    root = write_v2(tmp_path / "set", LENGTHS, table=table, video=False, tasks=("a", "b"))
    assert [s.instructions for s in opened(root)[1].sections] == [("a",), ("b",)]
    assert opened(root)[1].sections[1].start == 400_000_000
    assert "tasks of meta" in opened(root)[1].findings[0]  # it lists one of the two
    with pytest.raises(ValueError, match=r"no text for the tasks \[0, 2\] of episode 2"):
        opened(root)[2]


def test_rows_without_task_index_have_their_column_task(tmp_path):
    def table(e, length, first):
        texts = pa.array(["open"] * 3 + ["close"] * (length - 3))
        return rows(e, length, first, task_index=None, task=texts)

    (episode,) = opened(write_v2(tmp_path / "set", [8], table=table, video=False))
    assert [s.instructions for s in episode.sections] == [("open",), ("close",)]
    assert any("column task was taken" in finding for finding in episode.findings)


def test_a_column_task_that_differs_from_task_index_is_a_finding(tmp_path):
    for task, said in (("Do it.", 0), ("", 0), ("leave it", 1)):

        def table(e, n, first, task=task):
            return rows(e, n, first, task=[task] * n)

        root = write_v2(tmp_path / f"set {task}", LENGTHS, table=table)
        check(root, findings=[said] * 3)
        assert opened(root)[0].instructions == ("do it",)


def test_a_deleted_episode_is_not_a_lost_one(tmp_path):
    root = write_v3(tmp_path / "set", [8, 9, 7, 8], total_episodes=3)
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file).take([0, 1, 3]), file)
    assert [e.id for e in opened(root)] == [f"episode_{n:06d}" for n in (0, 1, 3)]


def test_a_column_of_the_list_that_is_not_used_costs_nothing(tmp_path):
    root = write_v3(tmp_path / "set", LENGTHS)
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    pq.write_table(table[:2].append_column("quality", pa.array([1, 2])), file)
    other = table[2:].append_column("quality", pa.array(["good"]))
    (root / "meta/episodes/chunk-001").mkdir()
    pq.write_table(other, root / "meta/episodes/chunk-001/file-000.parquet")
    check(root)
    lengths = pa.array([str(LENGTHS[2])])
    other = other.set_column(other.schema.get_field_index("length"), "length", lengths)
    pq.write_table(other, root / "meta/episodes/chunk-001/file-000.parquet")
    with pytest.raises(ValueError, match="meta/episodes: its files have columns of different ty"):
        opened(root)


def test_the_list_is_found_under_any_name_that_lerobot_reads(tmp_path):
    root = write_v3(tmp_path / "set", LENGTHS)
    (file,) = root.glob("meta/episodes/*/*")
    (file.parent / "._file_000.parquet").write_bytes(b"of macOS")
    file.rename(file.with_name("file_000.parquet"))
    check(root)
    (root / "meta/tasks.parquet").unlink()
    with pytest.raises(ValueError, match=r"tasks\.parquet is missing"):
        opened(root)[0]


def test_splits_other_than_train_are_a_finding(tmp_path):
    splits = {"train": "0:2", "val": "2:3"}
    root = write_v2(tmp_path / "set", LENGTHS, splits=splits, codebase_version="2.1")
    check(root, findings=[1, 1, 1])
    assert "the splits ['val']; they are not read" in opened(root)[0].findings[0]


def test_paths_that_were_written_on_windows(tmp_path):
    names = "data\\chunk-{episode_chunk:03d}\\episode_{episode_index:06d}.parquet"
    (episode,) = opened(write_v2(tmp_path / "set", [8], data_path=names))
    assert len(episode.streams["action"].values) == 8


@pytest.mark.parametrize("fps", [0, "10", None, True, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_named(tmp_path, fps):
    with pytest.raises(ValueError, match=r"info\.json must have fps, a positive number"):
        opened(write_v2(tmp_path / "set", [8], video=False, fps=fps))


def test_rows_without_task_index_have_the_only_task_of_the_list(tmp_path):
    def table(e, n, first):
        return rows(e, n, first, task_index=None, frame_index=None)

    root = write_v2(tmp_path / "set", LENGTHS, table=table)
    check(root, findings=[1, 1, 1])  # frame_index
    pq.write_table(
        rows(0, 8, index=["x"] * 8, frame_index=[None] * 8), next(root.rglob("*0.parq*"))
    )
    check(root, findings=[1, 1, 1])
    assert opened(root)[0].instructions == ("do it",)


# What nobody asks for.


def feature(dtype="float32", shape=(1,)):
    return {"extra": {"dtype": dtype, "shape": None if shape is None else list(shape)}}


@pytest.mark.parametrize(
    ("about", "column", "reason"),
    [
        (feature("binary"), lambda n: pa.array([b"\x80"] * n), "holds binary, not numbers"),
        (feature("object"), lambda n: pa.array([{"a": 1}] * n), "holds struct"),
        (feature("float32", [None, 4]), lambda n: pa.array([[[1.0] * 4] * (k % 3) for k in range(n)]
         ), "0 to 2 values"),
        (feature(), lambda n: pa.array([None if k == 2 else 1.0 for k in range(n)]), "missing"),
        (feature("float32", [2]), lambda n: pa.array([[1.0, None]] * n), "missing"),
        (feature(), None, "not in the file"),
        (feature("audio"), None, "not in the file"),
        (feature("image"), lambda n: pa.array([1.0] * n), "not images"),
        (feature("image"), None, "not in the file"),
        (feature("video"), None, "no file by video_path"),
        (feature("string"), lambda n: pa.array(["x"] * n), "text"),
        ({"extra": {"shape": [1]}}, None, "no dtype"),
        ({"extra": None}, None, "no dtype"),
        ({"extra": {"dtype": "video", "shape": [4, 4, 1], "info": {"is_depth_map": True}}}, None,
         "depth"),
        (feature("float32", [2, 7]), lambda n: pa.array([[1.0] * 14] * n), r"are \[14\].*\[2, 7\]"),
        (feature("float32", [7, 2]), lambda n: pa.array([[[1.0] * 7] * 2] * n), r"are \[2, 7\]"),
    ],
)  # fmt: skip
def test_a_part_that_cannot_be_read_costs_nothing_else(tmp_path, about, column, reason):
    def table(e, n, first):
        return rows(e, n, first, extra=column(n) if column and e != 2 else None)

    root = write_v2(tmp_path / "set", LENGTHS, table=table, features=about)
    check(root)
    left_out = opened(root)[0].left_out
    assert left_out.keys() == {"extra"}
    with pytest.raises(ValueError, match=reason):
        raise ValueError(left_out["extra"])


@pytest.mark.parametrize(
    ("about", "value", "shape"),
    [
        (feature("float32", [1]), 1.0, (1,)),
        (feature("float32", []), [1.0], ()),
        (feature("float32", [1, 7]), [1.0] * 7, (1, 7)),
        (feature("float32", [2, 7]), [[1.0] * 7] * 2, (2, 7)),
        ({"extra": {"dtype": "float32", "shape": 3}}, [1.0] * 3, (3,)),
        ({"extra": {"dtype": "float32"}}, [[1.0] * 3] * 2, (2, 3)),
        (feature("float32", None), 1.0, ()),
    ],
)
def test_a_shape_is_compared_by_its_sizes(tmp_path, about, value, shape):
    def table(e, n, first):
        return rows(e, n, first, extra=pa.array([value] * n))

    episode = opened(write_v2(tmp_path / "set", [8], table=table, video=False, features=about))[0]
    assert episode.streams["extra"].values.shape == (8, *shape)


def test_sizes_and_names_that_differ_are_findings(tmp_path):
    def found(**about):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        (episode,) = opened(write_v2(root, [4], features=about))
        assert episode.streams["action"].values.shape == (4, 2) and CAMERA in episode.streams
        return episode.findings

    action, camera = {"dtype": "float32", "shape": [2]}, {"dtype": "video"}
    for names in (None, ["action"], ["x", "y"], {"motors": ["x", "y"]}, {"x": 0, "y": 1}):
        assert not found(action={**action, "names": names})
    for names in (["x", "y"], {"motors": ["x", "y"]}, {"y": 1, "x": 0}, [["x"], ["y"]]):
        info = {"features": {"action": {**action, "names": names}}}
        root = write_v2(tmp_path / str(names), [4], video=False, **info)
        assert opened(root)[0].names == {"action": ("x", "y")}
    (text,) = found(action={**action, "names": {"a": ["x", "y"], "b": {"c": ["z"]}}})
    assert "names 3 of its 2 numbers" in text
    for shape in ([16, 96, 3], [3, 16, 96], [96, 16, 3], None):
        assert not found(**{CAMERA: {**camera, "shape": shape}})
    (text,) = found(**{CAMERA: {**camera, "shape": [480, 640, 3]}})
    assert "16 x 96 pixels" in text


def test_a_damaged_column_costs_nothing_else(tmp_path):
    rng = np.random.default_rng(0)

    def table(e, n, first):
        noise = pa.array(rng.normal(size=(n, 50)).tolist(), pa.list_(pa.float64()))
        return rows(e, n, first, extra=noise)

    root = write_v2(tmp_path / "set", LENGTHS, table=table, features=feature("float64", [50]))
    for file in root.glob("data/*/*.parquet"):
        metadata = pq.read_metadata(file)
        group = metadata.row_group(0)
        place = [group.column(i).path_in_schema for i in range(metadata.num_columns)]
        at = group.column(next(i for i, name in enumerate(place) if "extra" in name))
        start = at.dictionary_page_offset or at.data_page_offset
        content = bytearray(file.read_bytes())
        content[start : start + 200] = b"\xff" * 200
        file.write_bytes(content)
    check(root)
    assert "is damaged" in opened(root)[0].left_out["extra"]


def test_pictures_without_a_path_are_read(tmp_path):
    Image.new("RGB", (4, 2), (9, 9, 9)).save(png := io.BytesIO(), "PNG")

    def table(e, n, first):
        return rows(e, n, first, extra=pa.array([{"bytes": png.getvalue()}] * n))

    root = write_v2(tmp_path / "set", [4], table=table, features=feature("image"), video=False)
    assert opened(root)[0].streams["extra"].values.read([3]).max() == 9


def test_pictures_that_lie_beside_the_rows(tmp_path):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    png = tmp_path / "set/images/extra/frame.png"

    def table(e, n, first):
        images = [{"bytes": None, "path": "images/extra/frame.png"}] * n
        return rows(e, n, first, extra=pa.array(images, kind))

    root = write_v2(tmp_path / "set", [4], table=table, features=feature("image"), video=False)
    frames = opened(root)[0].streams["extra"].values
    with pytest.raises(ValueError, match="image 1 is not in the file"):
        frames.read([1])
    png.parent.mkdir(parents=True)
    Image.new("RGB", (4, 2), (9, 9, 9)).save(png)
    assert frames.read([1]).shape == (1, 2, 4, 3) and frames.read([1]).max() == 9
