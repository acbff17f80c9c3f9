"""What `launch.inspect` finds in datasets with known faults, and the page it draws."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import av
import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from data_pipelines.atomic import write_json, write_npz
from data_pipelines.episode import Episode, LazyEpisodes, Section, Stream
from data_pipelines.inspect import Wanted, inspect_dataset, inspect_path
from data_pipelines.inspect_page import write_page
from data_pipelines.inspect_records import inspect_records, is_records
from data_pipelines.inspect_text import describe
from data_pipelines.pickles import read_array_pickle
from data_pipelines.records import RecordWriter, write_texts
from data_pipelines.shards import StoredTexts
from data_pipelines.sources.formats import open_dataset
from data_pipelines.video import write_video
from data_pipelines.writers import (
    RobotEpisode,
    VideoPart,
    frame_stats,
    write_lerobot,
    write_video_folder,
)

FPS, FRAMES = 10, 12
CAMERA = "observation.images.top"
ROOT = Path(__file__).parents[1]


def _moving(seed: int, n: int = FRAMES) -> list[np.ndarray]:
    coarse = np.random.default_rng(seed).integers(60, 200, (6, 8, 3), np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    return [np.roll(picture, 4 * i, axis=1) for i in range(n)]


@pytest.fixture
def videos(tmp_path):
    """A video folder: good, cut off, frozen, black, and without words."""
    kinds = {
        "good": (_moving(0), "a hand opens a drawer"),
        "truncated": (_moving(1), "a hand closes a drawer"),
        "frozen": (_moving(2)[:1] * FRAMES, "nothing moves"),
        "black": ([np.zeros((48, 64, 3), np.uint8)] * FRAMES, "the lamp is off"),
        "silent": (_moving(3), ""),
        "short": (_moving(4, 2), "a blink"),
    }
    written = {}
    for name, (frames, caption) in kinds.items():
        written[name] = (tmp_path / f"{name}.mp4", caption)
        write_video(written[name][0], frames, FPS)
    root = tmp_path / "videos"
    write_video_folder(root, written)
    broken = root / "video/truncated.mp4"
    data = broken.read_bytes()
    broken.unlink()  # it is a link to the file that was written
    broken.write_bytes(data[: len(data) // 2])
    return root


@pytest.fixture
def robot(tmp_path):
    return write_robot(tmp_path)


def write_robot(tmp_path):
    """A LeRobot dataset: NaN in the second episode, a gap in the third, one dimension constant."""
    episodes = []
    for number in range(4):
        frames = _moving(number)
        path = tmp_path / f"{number}.mp4"
        write_video(path, frames, FPS)
        action = np.random.default_rng(number).normal(size=(FRAMES, 3)).astype(np.float32)
        action[:, 2] = 1.0
        if number == 1:
            action[5, 0], action[7, 1] = np.nan, np.inf
        part = VideoPart(path, 0, frame_stats(frames))
        task = ("pick up", "put down")[number % 2]
        episodes.append(RobotEpisode(task, {"action": action}, {CAMERA: part}))
    root = tmp_path / "robot"
    write_lerobot(root, episodes, fps=FPS, robot_type="arm", frame_size=(48, 64))
    (file,) = root.glob("data/*/*.parquet")
    table = pq.read_table(file)
    times = table["timestamp"].to_numpy().copy()
    times[2 * FRAMES + 6 : 3 * FRAMES] += 0.5
    place = table.schema.get_field_index("timestamp")
    pq.write_table(table.set_column(place, "timestamp", [times]), file)
    return root


def _inspect(format, path, **options):
    return inspect_dataset(open_dataset(format, path, "set", "arm"), str(path), format, **options)


def _kinds(found):
    return {kind: [p.episode for p in group] for kind, group in found.problems_by_kind().items()}


def test_faults_of_videos_are_found_and_named(videos):
    found = _inspect("video_folder", videos)
    assert _kinds(found) == {
        "unreadable video": ["number 5"],
        "frozen video": ["frozen"],
        "black video": ["black"],
        "no instruction": ["silent"],
        "two or fewer samples": ["short"],
    }
    (unreadable,) = found.problems_by_kind()["unreadable video"]
    assert "truncated.mp4" in unreadable.text
    assert found.readable == 5
    stream = found.streams["video"]
    assert (stream.shape, stream.codec, stream.rate) == ((48, 64, 3), "h264", FPS)
    assert found.instructions["a hand opens a drawer"] == 1
    assert sorted(found.lengths) == pytest.approx([0.2, 1.2, 1.2, 1.2, 1.2])
    assert "64x48" in describe(found) and "5 of 6" in describe(found)


def test_damage_in_the_middle_is_found_by_decoding_everything(videos):
    """The lists of such a file are whole, and so are the three frames that are looked at."""
    path = videos / "video/good.mp4"
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    length = int.from_bytes(data[start - 8 : start - 4], "big") - 8
    third = start + int(length * 0.7)
    data[third : third + length // 8] = bytes(length // 8)
    path.unlink()
    path.write_bytes(data)
    found = _inspect("video_folder", videos, thorough=True)
    assert "good" in _kinds(found)["unreadable video"]


def test_faults_of_numbers_are_found_and_named(robot):
    found = _inspect("lerobot", robot)
    kinds = _kinds(found)
    assert kinds["NaN or infinity"] == ["episode_000001"]
    assert kinds["timestamp gap"] == ["episode_000002"]
    assert len(kinds["finding"]) == 2  # the pause is in timestamp, and not in the video
    assert kinds["constant dimension"] == ["the dataset"]
    texts = {problem.kind: problem.text for problem in found.problems}
    assert "2 of 36 numbers, in the dimensions 0, 1, first in sample 5" in texts["NaN or infinity"]
    assert "the longest 0.6 s after 0.500 s" in texts["timestamp gap"]
    assert texts["constant dimension"] == "action: 2 (always 1)"
    action = found.streams["action"]
    assert (action.shape, action.dtype) == ((3,), "float32")
    assert np.isfinite(action.low).all() and action.low[2] == action.high[2] == 1
    assert found.instructions == {"pick up": 2, "put down": 2}


def test_missing_files_leave_the_rest_readable(robot):
    next(robot.glob("videos/*/*/file-001.mp4")).unlink()
    found = _inspect("lerobot", robot)
    (((name, why), count),) = found.left_out.items()
    assert name == CAMERA and "there is no file" in why and count == 1
    next(robot.glob("data/*/*.parquet")).unlink()
    found = _inspect("lerobot", robot)
    assert len(_kinds(found)["missing file"]) == 4 and found.readable == 0


def test_faults_are_counted_under_the_words_that_people_use(videos):
    """By the type of the error or of its cause; where a source checks by itself, by its words."""
    (videos / "video/good.mp4").unlink()
    (videos / "video/good.mp4").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x")
    (videos / "metas/frozen.txt").write_bytes("Tür".encode("latin1"))
    kinds = _kinds(_inspect("video_folder", videos))
    assert len(kinds["file that was not downloaded"]) == 1
    assert len(kinds["text in another encoding"]) == 1

    def wrapped(cause):
        try:
            raise cause
        except type(cause):
            raise ValueError("in a source's own words") from None

    hostile = pickle.dumps(print)
    faults = [
        lambda: Stream(np.zeros(2, np.int64), np.zeros(2)),
        lambda: Stream(np.zeros(0, np.int64), np.zeros(0)),
        lambda: read_array_pickle(hostile, "poses.pkl"),
        lambda: {}["poses"],
        lambda: wrapped(FileNotFoundError("a")),
        lambda: wrapped(UnicodeDecodeError("utf-8", b"a", 0, 1, "b")),
        lambda: wrapped(av.InvalidDataError(1, "a")),
        lambda: wrapped(KeyError("a")),
    ]
    found = inspect_dataset(LazyEpisodes(8, lambda i: faults[i]()), "set", "in memory")
    assert _kinds(found) == {
        "timestamps that do not increase": ["number 0"],
        "empty stream": ["number 1"],
        "refused pickle": ["number 2"],
        "unreadable episode": ["number 3", "number 7"],
        "missing file": ["number 4"],
        "text in another encoding": ["number 5"],
        "unreadable video": ["number 6"],
    }
    assert found.problems[3].text == "KeyError: 'poses'" and found.readable == 0


def test_a_dataset_of_unknown_rate_is_looked_at_all_the_same():
    found = inspect_path(ROOT / "tests/fixtures/rlds/arm/1.0.0", "rlds", {})
    assert found.readable == 4
    assert dict(found.facts)["rate"] == "unknown; a step is shown as one second"
    (problem,) = found.problems_by_kind()["unknown rate"]
    assert "set dataset.options.fps" in problem.text
    found = inspect_path(ROOT / "tests/fixtures/rlds/arm/1.0.0", "rlds", {"fps": 10})
    assert "unknown rate" not in found.problems_by_kind()
    assert found.streams["steps/action"].rate == pytest.approx(10)


def _episode(name, times, shape=(2,), video=None):
    streams = {"action": Stream(times, np.random.default_rng(0).normal(size=(len(times), *shape)))}
    if video is not None:
        streams["front"] = Stream(times, video)
    return Episode(name, "set", "arm", ("go",), streams, ("front",) if video is not None else ())


def test_episodes_that_differ_from_the_first_are_named():
    times = np.arange(10, dtype=np.int64) * 10**8
    twice = times.copy()
    twice[4] = twice[3] + 10
    video = np.stack(_moving(0, 10))
    episodes = [
        _episode("a", times, video=video),
        _episode("b", times, shape=(3,), video=video),
        _episode("c", times),
        _episode("d", twice, video=video),
        _episode("a", times, video=video[:, :24]),
    ]
    found = inspect_dataset(episodes, "set", "in memory")
    kinds = _kinds(found)
    assert kinds["other shape"] == ["b", "a"]
    assert kinds["missing stream"] == ["c"]
    assert kinds["duplicate timestamps"] == ["d"]
    assert kinds["duplicate id"] == ["a"]
    assert found.readable == 5


def test_a_quaternion_of_either_sign_is_named_though_no_episode_has_both():
    times = np.arange(20, dtype=np.int64) * 10**8
    half = np.linspace(0.2, 0.4, 20)[:, None]
    turn = np.concatenate([np.sin(half), 0.1 + 0 * half, 0 * half, np.cos(half)], 1)
    turn /= np.linalg.norm(turn, axis=1, keepdims=True)
    for signs, found in (((1, 1, 1), False), ((1, -1, 1), True)):
        episodes = [
            replace(_episode(str(i), times), streams={"rotation": Stream(times, sign * turn)})
            for i, sign in enumerate(signs)
        ]
        kinds = _kinds(inspect_dataset(episodes, "set", "in memory"))
        assert ("jump between two values of one angle" in kinds) == found


def test_cameras_of_different_length_are_named():
    times, video = np.arange(20, dtype=np.int64) * 10**8, np.stack(_moving(0, 20))
    episode = _episode("a", times, video=video)
    for some in (slice(12), slice(8, None), slice(None)):
        wrist = Stream(times[some], video[some])
        streams = {"front": episode.streams["front"], "wrist": wrist}
        both = replace(episode, streams=streams, cameras=("front", "wrist"))
        kinds = _kinds(inspect_dataset([both], "set", "in memory"))
        assert ("videos of different length" in kinds) == (some != slice(None))


def test_what_an_encoding_job_would_not_use_is_listed(tmp_path):
    times = np.arange(10, dtype=np.int64) * 10**8
    episodes = [_episode(name, times) for name in "abc"]
    episodes[0] = replace(episodes[0], left_out={"wrist": "not downloaded", "<b>": "of bytes"})
    episodes[2] = replace(episodes[2], left_out={"wrist": "not downloaded"}, findings=("x",))
    parts = (Section(0, ("go",)), Section(5 * 10**8, ("go",)))
    episodes[1] = replace(episodes[1], sections=parts)
    episodes.append(replace(episodes[1], id="d", streams={}, left_out={"action": "a null"}))
    found = inspect_dataset(episodes, "set", "in memory")
    assert _kinds(found)["no stream that can be used"] == ["d"]
    assert dict(found.facts)["task changes"] == "within 1 episode"
    assert "wrist: not downloaded (2 episodes)" in describe(found)
    assert "<b>: of bytes (1 episode)" in describe(found)
    assert _kinds(found)["finding"] == ["c"]
    write_page(found, tmp_path / "page.html")
    assert "&lt;b&gt;: of bytes (1 episode)" in (tmp_path / "page.html").read_text()


def test_many_reasons_for_one_stream_are_summed_up():
    times = np.arange(10, dtype=np.int64) * 10**8
    whys = ["not downloaded"] * 3 + [f"row {i} is null" for i in range(30)]
    left = [{"wrist": why} for why in whys]
    episodes = [replace(_episode(str(i), times), left_out=out) for i, out in enumerate(left)]
    text = describe(inspect_dataset(episodes, "set", "in memory"))
    assert text.count("wrist: ") == 6 and "wrist: not downloaded (3 episodes)" in text
    assert "wrist: 26 other reasons (26 episodes)" in text


def test_what_the_encoding_job_of_a_configuration_would_skip_is_listed():
    times = np.arange(10, dtype=np.int64) * 10**8
    video = np.stack(_moving(0, 10))
    episodes = [_episode(name, times, video=video) for name in "abcd"]
    episodes[1].streams["action"].values[3, 1] = np.inf
    without = {"front": episodes[2].streams["front"]}
    episodes[2] = replace(episodes[2], streams=without, left_out={"action": "of bytes"})
    episodes[3] = _episode("d", times)
    io = dict(
        action=dict(horizon=2, fps=10, shift=0.0, dim=2), proprio=dict(horizon=1, fps=1, dim=1)
    )
    dataset = dict(name="set", video="front", action="action", proprio="")
    clip = dict(height=16, width=16)
    wanted = Wanted(*map(ConfigDict, (dataset, io, clip)))
    found = inspect_dataset(episodes, "set", "in memory", wanted=wanted)
    skipped = {p.episode: p.text for p in found.problems if "skipped" in p.kind}
    assert skipped.keys() == {"b", "c", "d"}
    assert "not finite" in skipped["b"] and "action (of bytes)" in skipped["c"]
    assert "asks for the cameras ['front'], but" in skipped["d"]
    viewed = ConfigDict(dataset | dict(views=dict(hand="wrist")))
    views = ConfigDict(clip | dict(views=dict(hand=clip)))
    found = inspect_dataset(
        episodes[:1], "set", "in memory", wanted=wanted._replace(dataset=viewed, clip=views)
    )
    (skipped,) = found.problems_by_kind()["skipped by the encoding job"]
    assert "set.views asks for the cameras ['wrist'], but" in skipped.text
    wanted = wanted._replace(texts=StoredTexts(8, 4))
    found = inspect_dataset(episodes[:1], "set", "in memory", wanted=wanted)
    assert "stores no embedding" in found.problems_by_kind()["skipped by the encoding job"][0].text


def test_a_mode_is_no_angle_and_bookkeeping_no_action():
    times = np.arange(80, dtype=np.int64) * 10**8
    rare = np.zeros((80, 1), np.float32)
    rare[3] = 1
    modes, turns = (np.where(np.arange(80)[:, None] < 40, a, b) for a, b in ((0, 6), (1, 358)))
    numbers = {"mode": modes, "rewards": rare, "next.terminated": rare, "dones": rare}
    streams = {name: Stream(times, values) for name, values in (numbers | dict(turn=turns)).items()}
    episode = Episode("a", "set", "arm", ("go",), streams, ())
    found = inspect_dataset([episode], "set", "in memory")
    assert [p.text[:4] for p in found.problems if "angle" in p.kind] == ["turn"]
    lost = [p.text.split(":")[0] for p in found.problems if "VARIANCE" in p.kind]
    assert not {"rewards", "dones", "next.terminated"} & {*lost}


def test_a_pause_is_named_and_does_not_change_the_rate():
    """A rate that changes is no pause, and a pause is measured by what is around it."""
    steps = np.full(40, 10**8)
    paused, faster = steps.copy(), np.r_[steps[:20], np.full(40, 2 * 10**7)]
    paused[25] = 6 * 10**9
    episodes = [_episode(str(i), np.r_[0, np.cumsum(s)]) for i, s in enumerate((paused, faster))]
    found = inspect_dataset(episodes, "set", "in memory")
    assert _kinds(found).get("timestamp gap") == ["0"]
    assert "6 s after 2.500 s (a period is 0.1 s)" in found.problems[0].text
    only = inspect_dataset(episodes[:1], "set", "in memory")
    assert only.streams["action"].rate == pytest.approx(10)
    assert only.lengths == pytest.approx([10.0])
    alternating = np.r_[0, np.cumsum(np.tile([33, 67], 30) * 10**6)]
    found = inspect_dataset([_episode("a", alternating)], "set", "in memory")
    assert "timestamp gap" not in _kinds(found)
    assert found.streams["action"].rate == pytest.approx(20)


def test_a_part_of_a_large_dataset_is_looked_at():
    asked = []

    def load(index):
        asked.append(index)
        return _episode(str(index), np.arange(10, dtype=np.int64) * 10**8)

    found = inspect_dataset(LazyEpisodes(100_000, load), "set", "in memory", limit=50)
    assert len(asked) == 50 and {0, 99_999} <= set(asked)
    assert dict(found.facts)["hours"].startswith("about 27.78")


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.figures, self.links = [], 0, []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.images += [values["src"]] if tag == "img" else []
        self.figures += tag == "svg"
        self.links += [values[key] for key in ("href", "src") if key in values]


def test_the_page_needs_nothing_else(robot, tmp_path):
    found = _inspect("lerobot", robot)
    found.instructions["<script>alert(1)</script>"] = 1
    write_page(found, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = _Page()
    page.feed(text)
    assert len(page.images) == 4 * 3  # first, middle and last frame of every episode
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in page.links)
    assert page.figures == 4 * 3 + 1  # a curve per dimension, and the lengths
    assert "<script" not in text and "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    for problem in found.problems:
        assert problem.episode in text
    assert "episode_000001" in text and "pick up" in text


def test_what_a_dataset_says_is_text_on_the_page(tmp_path):
    """Names and texts come from strangers: markup in them stays text."""
    times = np.arange(10, dtype=np.int64) * 10**8
    values = np.random.default_rng(0).normal(size=(10, 2))
    values[:, 1] = np.nan
    streams = {
        "<b>action": Stream(times, values),
        "<b>front": Stream(times, np.stack(_moving(0, 10))),
    }
    episode = Episode("<b>a\udcff", "set", "<b>arm", ("<b>go",), streams, ("<b>front",))
    found = inspect_dataset([episode], "<b>set", "<b>format")
    write_page(found, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>a" not in text and "<b>front" not in text and "<b>go" not in text
    assert "<b>set" not in text and "<b>format" not in text and "<b>arm" not in text
    assert "&lt;b&gt;a\\udcff" in text  # the byte that is not UTF-8, written out
    page = _Page()
    page.feed(text)
    assert page.figures == 2  # the lengths, and the dimension that has numbers
    assert "No finite number." in text
    assert "<b>a\\udcff" in describe(found).replace("'", "")


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records"
    path.mkdir()
    actions = np.random.default_rng(0).normal(size=(6, 4, 2)).astype(np.float32)
    with RecordWriter(path / "shard_00000.arrayrecord") as writer:
        for i in range(6):
            latents = np.ones((2, 2, 2, 16), ml_dtypes.bfloat16)
            latents[0, 0, 0, 0] = np.nan if i == 4 else 0
            row = {"latents": latents, "episode": np.int64(i // 3), "text": np.int64(0)}
            writer.write(row | {"anchor": np.int64(i), "actions": actions[i]})
    rows = [
        dict(id="a", instructions=["open"], count=3, digest="x"),
        dict(id="b", instructions=["close"], count=3, digest="y"),
        dict(id="c", instructions=[], count=0, reason="ValueError: cut off"),
    ]
    plan = dict(dataset={"name": "toy"}, clip={"fps": 5}, episodes=3, episodes_per_shard=2)
    write_json(path / "plan.json", plan)
    columns = dict(rows=np.asarray(json.dumps(rows)), anchor=np.arange(6), actions=actions)
    write_npz(path / "shard_00000.npz", **columns)
    write_texts(path / "texts.npz", ["open", "close"], np.ones((2, 3, 4)))
    listed = [
        dict(id=r["id"], instructions=[i] if i < 2 else [], first=3 * i, count=r["count"])
        | {"split": "train"}
        for i, r in enumerate(rows)
    ]
    manifest = dict(settings=plan, fingerprint="f", shards=["shard_00000.arrayrecord"])
    manifest |= dict(skipped=[{"id": "c", "reason": "ValueError: cut off"}], episodes=listed)
    write_json(path / "manifest.json", manifest)
    return path


def test_records_are_looked_at(records, tmp_path):
    assert is_records(records) and not is_records(tmp_path)
    found = inspect_records(records)
    assert _kinds(found) == {"skipped while encoding": ["c"], "NaN or infinity": ["b"]}
    assert found.lengths == [3, 3] and found.instructions == {"open": 1, "close": 1}
    assert found.streams["latents"].shape == (2, 2, 2, 16)
    assert found.streams["actions"].low.shape == (2,)
    write_page(found, tmp_path / "page.html")
    assert "cut off" in (tmp_path / "page.html").read_text()


def test_records_that_are_not_finished_are_looked_at(records):
    (records / "manifest.json").unlink()
    found = inspect_records(records)
    assert "not finished" in dict(found.facts)["format"]
    assert dict(found.facts)["shards"] == "1 of 2 finished"
    assert found.instructions == {"open": 1, "close": 1} and found.readable == 2


@pytest.mark.parametrize("finished", [True, False])
def test_records_without_words_are_named(records, finished):
    if finished:
        write_texts(records / "texts.npz", ["open", " "], np.ones((2, 3, 4)))
    else:
        (records / "manifest.json").unlink()
        with np.load(records / "shard_00000.npz") as columns:
            kept = dict(columns)
        rows = str(kept.pop("rows")).replace('"close"', '""')
        write_npz(records / "shard_00000.npz", rows=np.asarray(rows), **kept)
    assert _kinds(inspect_records(records))["no instruction"] == ["b"]


def test_a_corrupt_record_is_named(records):
    file = records / "shard_00000.arrayrecord"
    data = bytearray(file.read_bytes())
    places = [match.start() for match in re.finditer(rb'\[\["latents"', data)]
    place = places[3] + 300
    data[place : place + 200] = bytes(range(200))
    file.write_bytes(data)
    found = inspect_records(records)
    assert "unreadable record" in _kinds(found)


def _command(*arguments):
    command = [sys.executable, "-m", "launch.inspect", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command(videos, tmp_path):
    result = _command(videos, f"--out={tmp_path / 'page.html'}", "--strict")
    assert result.returncode == 1, result.stderr
    assert "video_folder" in result.stdout and "frozen video" in result.stdout
    assert (tmp_path / "page.html").stat().st_size > 10_000
    for file in (videos / "video").iterdir():
        file.unlink()
        file.write_bytes(b"no video")
    result = _command(videos)
    assert result.returncode == 2
    assert "could be read" in result.stderr and "Traceback" not in result.stderr


def test_what_normalisation_would_lose_is_named(tmp_path):
    """A suction command in one step of 80; bookkeeping, which is as rare, is nobody's action."""
    times = np.arange(400, dtype=np.int64) * 10**8
    rare = (np.arange(400) % 80 == 40) * 1.0
    action = Stream(times, np.stack([np.sin(times / 1e9), rare], 1).astype(np.float32))
    streams = {"action": action, "next.reward": Stream(times, rare[:, None])}
    episodes = [Episode(str(i), "desk", "arm", ("press",), streams, ()) for i in range(3)]
    found = inspect_dataset(episodes, "", "")
    ((kind, (problem,)),) = found.problems_by_kind().items()
    assert "VARIANCE, the default" in kind
    assert "action: dimension 1 is 0 except in 1.3 %" in problem.text
    assert "normalize='SQUASH'" in problem.text
