import json
import pickle
import threading
from fractions import Fraction

import av
import numpy as np
import pytest

from data_pipelines.sources.clip_lists import open_clip_list
from data_pipelines.sources.formats import detect, open_dataset
from data_pipelines.video import VideoFile, write_video

FPS = 20
COUNT = 60  # three seconds


def pictures(count: int = COUNT) -> list[np.ndarray]:
    """Frame i has the grey level 4 * i."""
    return [np.full((16, 32, 3), 4 * i, np.uint8) for i in range(count)]


def write_webm(path, count: int, rate: int = 12) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=rate, options={"crf": "10", "b": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for i, picture in enumerate(pictures(count)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    write_video(path, pictures(), FPS, crf=10)
    return path


def shown(episode) -> list[int]:
    """Numbers of the frames, from their grey levels."""
    video = episode.streams["video"].values
    return np.rint(video.read(range(len(video))).mean((1, 2, 3)) / 4).astype(int).tolist()


def open_it(path, **options):
    return open_clip_list(path, name="clips", embodiment="human", **options)


def frames_between(start: str, end: str) -> list[int]:
    return [i for i in range(COUNT) if Fraction(start) <= Fraction(i, FPS) < Fraction(end)]


def test_a_clip_is_the_frames_from_its_start_to_before_its_end(long_video, tmp_path):
    # Between frames, on a frame, and a frame's time that floats only come near, from either side.
    parts = [("0", "1"), ("0.05", "0.1"), ("0.051", "0.149"), ("1.15", "1.3"), ("0.7", "3")]
    parts += [("0.35", "0.65"), ("0.1", "0.2")]
    lines = [{"file": "long.mp4", "start": float(a), "end": b, "caption": a} for a, b in parts]
    path = tmp_path / "clips.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert detect(path) == "clip_list"
    episodes = open_it(path, videos=str(long_video.parent))
    for episode, (start, end) in zip(episodes, parts, strict=True):
        assert shown(episode) == frames_between(start, end)
        assert episode.instructions == (start,)
        times = episode.streams["video"].timestamps
        np.testing.assert_array_equal(times, np.arange(len(times)) * 50_000_000)


def test_csv_times_frames_and_whole_files(long_video, tmp_path):
    (tmp_path / "clips.csv").write_text(
        "\ufefffile,start,end,start_frame,end_frame,fps,caption\r\n"
        'long.mp4,00:00:01.5,0:02,,,,"pick, then ""place"""\r\n'
        "long.mp4,,,30,40,20,by numbers\r\n"
        "long.mp4,,,,,,all of it\r\n"
        "long.mp4,2.5,,,,,to the end\r\n"
        '"long.mp4",,0.2,,,,"two\r\nlines"\r\n'
        "\r\n"
        "long.mp4,1.5,2,,,,again\r\n",
        encoding="utf-8",
        newline="",
    )
    episodes = open_it(tmp_path / "clips.csv", videos=str(long_video.parent))
    assert [shown(episode) for episode in episodes] == [
        list(range(30, 40)),
        list(range(30, 40)),
        list(range(COUNT)),
        list(range(50, 60)),
        [0, 1, 2, 3],
        list(range(30, 40)),
    ]
    texts = [episode.instructions[0] for episode in episodes]
    assert texts[:2] == ['pick, then "place"', "by numbers"]
    assert texts[4] == "two\r\nlines"
    ids = [episode.id for episode in episodes]
    assert ids[0] == "long.mp4 00:00:01.5-0:02"
    assert len(set(ids)) == len(ids)


def test_frame_numbers_follow_rounded_times(tmp_path):
    write_webm(tmp_path / "a.webm", 40, rate=30)  # milliseconds: 0, 33, 67, 100, ...
    (tmp_path / "c.tsv").write_text("path\tfrom\tto\ttext\na.webm\t1\t8\tx\n")
    columns = {"file": "path", "start_frame": "from", "end_frame": "to", "caption": "text"}
    (episode,) = open_it(tmp_path / "c.tsv", columns=columns, fps=30)
    assert shown(episode) == list(range(1, 8))
    with pytest.raises(ValueError, match="frame numbers need a frame rate; set the option fps"):
        open_it(tmp_path / "c.tsv", columns=columns)[0]
    with pytest.raises(ValueError, match=r"columns has no \['text'\]"):
        open_it(tmp_path / "c.tsv", columns={"text": "caption"})


def test_malformed_lines_are_broken_episodes_and_stop_nothing(long_video, tmp_path):
    (tmp_path / "clips.csv").write_bytes(
        b"file,start,end,caption\n"
        b"long.mp4,0,1,good\n"
        b"long.mp4,0,1\n"
        b"long.mp4,0,1,na\xefve\n"
        b'long.mp4,0,1,"never closed\n'
        b'long.mp4,0,1,"good too"\n'
        b"long.mp4,one,two,c\n"
        b"long.mp4,2,1,c\n"
        b"long.mp4,7,8,c\n"
        b"absent.mp4,0,1,c\n"
        b",0,1,c\n"
        b"long.mp4,0,1e99,c\n"
        b"long.mp4,0,1,last\n"
    )
    episodes = open_it(tmp_path / "clips.csv", videos=str(long_video.parent))
    assert len(episodes) == 12
    expected = {
        1: r"clips\.csv, line 3: .*3 fields, but the first line has 4",
        2: r"line 4: 'na\\udcefve' is not UTF-8 \(character 2 is the byte 0xef\)",
        3: r"line 5: a (malformed line|quote is opened)",
        5: r"line 7: 'one' is not a time; give seconds or HH:MM:SS\.ff",
        6: r"line 8: the clip ends at 1\.0 s, before it starts",
        7: r"line 9: .*long\.mp4: no frames between 7\.0 s and 8\.0 s; the last one is at 2\.950 s",
        8: r"line 10: .*absent\.mp4: .*No such file",
        9: "line 11: .* must be strings",
    }
    for index, message in expected.items():
        with pytest.raises(ValueError, match=message):
            episodes[index]
    assert [episodes[i].instructions[0] for i in (0, 4, 11)] == ["good", "good too", "last"]

    (tmp_path / "clips.jsonl").write_bytes(
        b'{"file": "long.mp4", "end": 1, "caption": "good"}\n'
        b'{"file": "long.mp4", \n'
        b'["long.mp4"]\n'
        b'{"file": "long.mp4"}\n'
        b'{"file": "long.mp4", "start": NaN, "caption": "c"}\n'
        b"\n"
        b'{"file": "long.mp4", "caption": ["two", "captions"]}\n'
    )
    episodes = open_it(tmp_path / "clips.jsonl", videos=str(long_video.parent))
    for index, message in {
        1: r"line 2: not a JSON object \(",
        2: "line 3: not a JSON object",
        3: r"line 4: there is no column 'caption', but \['file'\]; name it in the option columns",
        4: "line 5: 'nan' is not a time",
    }.items():
        with pytest.raises(ValueError, match=message):
            episodes[index]
    assert episodes[5].instructions == ("two", "captions")
    assert len(shown(episodes[0])) == FPS


def test_ids_do_not_depend_on_other_lines(long_video, tmp_path):
    def ids(*lines: str) -> list[str]:
        path = tmp_path / "clips.csv"
        path.write_text("\n".join(["file,start,end,caption", *lines]))
        return [e.id for e in open_it(path, videos=str(long_video.parent))]

    first, second = "long.mp4,0,1,a", "long.mp4,1,2,b"
    assert ids(first, second) == ids(second, first)[::-1] == ["long.mp4 0-1", "long.mp4 1-2"]
    assert ids(first, first) == ["long.mp4 0-1", "long.mp4 0-1 #2"]


def test_epic_kitchens(tmp_path, long_video):
    (tmp_path / "P01/videos").mkdir(parents=True)
    (tmp_path / "P01/videos/P01_01.MP4").symlink_to(long_video)
    (tmp_path / "EPIC_100_train.csv").write_text(
        "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
        "start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,"
        "all_noun_classes\n"
        "P01_01_0,P01,P01_01,00:00:01.089,00:00:00.14,00:00:01.37,8,202,open door,open,3,door,3,"
        "['door'],[3]\n"
        'P01_01_1,P01,P01_01,00:00:02.629,00:00:01.37,00:00:02.00,262,370,"mix, pasta",mix,1,'
        "pasta,2,\"['a', 'b']\",\"[2, 3]\"\n"
    )
    assert detect(tmp_path / "EPIC_100_train.csv") == "clip_list"
    episodes = open_dataset("clip_list", tmp_path / "EPIC_100_train.csv", "epic", "human")
    assert [episode.id for episode in episodes] == ["P01_01_0", "P01_01_1"]
    assert [e.instructions for e in episodes] == [("open door",), ("mix, pasta",)]
    assert shown(episodes[0]) == list(range(3, 28))
    assert shown(episodes[1]) == list(range(28, 40))


def test_something_something(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "20bn-something-something-v2").mkdir()
    write_webm(tmp_path / "20bn-something-something-v2/78687.webm", 24)
    content = (tmp_path / "20bn-something-something-v2/78687.webm").read_bytes()
    cut = tmp_path / "20bn-something-something-v2/42326.webm"
    cut.write_bytes(content[: len(content) // 2])
    rows = [
        {"id": "78687", "label": "holding potato next to cup", "template": "Holding [something]"},
        {"id": "42326", "label": "throwing keys", "template": "Throwing [something]"},
        "damaged",
    ]
    path = tmp_path / "labels/train.json"
    path.write_text(json.dumps(rows))
    assert detect(path) == "clip_list"
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps([{"file": "a.mp4", "caption": "a"}]))
    assert detect(plain) == "clip_list"
    episodes = open_it(path)
    assert (episodes[0].id, episodes[0].instructions) == ("78687", ("holding potato next to cup",))
    assert shown(episodes[0]) == list(range(24))
    with pytest.raises(ValueError, match=r"entry 2: .*42326\.webm: not a readable video"):
        episodes[1]
    with pytest.raises(ValueError, match="entry 3: not a JSON object"):
        episodes[2]


def test_ego4d_narrations_are_the_time_around_them(tmp_path, long_video):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "full_scale").mkdir()
    (tmp_path / "full_scale/abc-1.mp4").symlink_to(long_video)
    narrations = [
        {"timestamp_sec": 0.25, "timestamp_frame": 5, "narration_text": "#C C opens a drawer"},
        {"timestamp_sec": 1.5, "narration_text": "#C C takes a cup"},
        {"narration_text": "when?"},
    ]
    passes = {"narration_pass_1": {"narrations": narrations, "summaries": []}, "status": "done"}
    path = tmp_path / "annotations/narration.json"
    path.write_text(
        json.dumps({"abc-1": passes, "redacted": {"narration_pass_1": {"narrations": None}}})
    )
    assert detect(path) == "clip_list"
    episodes = open_it(path, narration_seconds=1)
    assert [e.instructions[0] for e in (episodes[0], episodes[1])] == [
        "#C C opens a drawer",
        "#C C takes a cup",
    ]
    assert shown(episodes[0]) == frames_between("0", "0.75")
    assert shown(episodes[1]) == frames_between("1", "2")
    with pytest.raises(ValueError, match=r"entry 3: a narration of abc-1 has no timestamp_sec"):
        episodes[2]


def test_clips_of_one_video_share_an_index_and_a_decoder(long_video, tmp_path, monkeypatch):
    import data_pipelines.video as video

    read = []
    monkeypatch.setattr(video, "read_index", lambda p, f=video.read_index: read.append(p) or f(p))
    lines = [f"long.mp4,{i / 10},{i / 10 + 0.1},{i}" for i in range(30)]
    (tmp_path / "clips.csv").write_text("\n".join(["file,start,end,caption", *lines]))
    episodes = pickle.loads(
        pickle.dumps(open_it(tmp_path / "clips.csv", videos=str(long_video.parent)))
    )
    wrong = []

    def check(numbers):
        for i in numbers:
            if shown(episodes[i]) != [2 * i, 2 * i + 1]:
                wrong.append(i)

    rng = np.random.default_rng(0)
    threads = [threading.Thread(target=check, args=(rng.permutation(30),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert read == [long_video]


def test_what_cannot_be_opened_says_why(tmp_path):
    def write(name: str, content: bytes):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    with pytest.raises(ValueError, match="no usable clip among 0 lines; it is empty"):
        open_it(write("a.csv", b"file,caption\n"))
    with pytest.raises(ValueError, match=r"number 2: there is no column 'file', but"):
        open_it(write("b.csv", b"video,caption\na.mp4,x\n"))
    with pytest.raises(ValueError, match="the first line is not UTF-8"):
        open_it(write("c.csv", "file,caption\na.mp4,x\n".encode("utf-16")))
    with pytest.raises(ValueError, match="not a JSON file"):
        open_it(write("d.json", b'[{"id": 1'))
    with pytest.raises(ValueError, match=r"a list of clips is one of \.csv"):
        open_it(write("e.xlsx", b""))
    with pytest.raises(ValueError, match="layout 'epik' is not one of auto, plain, epic"):
        open_it(tmp_path / "a.csv", layout="epik")


def test_parts_that_are_not_exact_begin_half_a_frame_early(long_video):
    assert len(VideoFile(long_video, 0.051, 0.149)) == 2
    assert len(VideoFile(long_video, 0.051, 0.149, exact=True)) == 1


def test_what_the_list_and_the_video_disagree_about_is_a_finding(long_video, tmp_path):
    rows = {
        "0,2.9,,,": "",
        "0,3.6,,,": "",  # rounded up
        "0,90,,,": "are start and end frame numbers",
        "1,2,20,40,20": "",
        "1,2,21,41,20": "",  # counted from 1
        "1,2,30,60,30": "",
        "1,2,30,60,20": "the start and the start_frame of a line disagree; the start is taken",
        ",,20,40,20": "",
        ",,30,60,30": "another frame rate than the video has",
    }
    lines = [f"long.mp4,{row},x" for row in rows]
    path = tmp_path / "clips.csv"
    path.write_text("\n".join(["file,start,end,start_frame,end_frame,fps,caption", *lines]))
    for episode, said in zip(open_it(path, videos=str(long_video.parent)), rows.values()):
        assert len(episode.findings) == bool(said)
        assert not said or said in episode.findings[0]
    assert shown(open_it(path, videos=str(long_video.parent))[6]) == list(range(20, 40))


def test_times_under_other_names_are_a_finding(long_video, tmp_path):
    path = tmp_path / "clips.csv"
    for header, said in {
        "start_time,end_time": "the whole video; if the columns end_time, start_time say",
        "start,duration": "from its start to the end of the video; if the columns duration say",
        "timestamp,x": "if the columns timestamp say",
        "score,camera_motion": "",
    }.items():
        path.write_text(f"file,caption,{header}\n{long_video},x,1,2\n")
        findings = open_it(path)[0].findings
        assert [said in text for text in findings] == ([True] if said else [])
    path.write_text(f"file,caption,start_time,end_time\n{long_video},x,1,2\n")
    (episode,) = open_it(path, columns={"start": "start_time", "end": "end_time"})
    assert shown(episode) == frames_between("1", "2") and not episode.findings


def test_times_in_a_broadcast_begin_with_it(tmp_path):
    """The clock of MPEG-TS begins anywhere, with FFmpeg at 1.4 s."""
    with av.open(str(tmp_path / "a.ts"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for picture in pictures():
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (tmp_path / "a.csv").write_text("file, start, end, caption\n a.ts , 1, 2, c\na.ts,,1,c\n")
    second, first = open_it(tmp_path / "a.csv")
    assert shown(second) == list(range(FPS, 2 * FPS)) and shown(first) == list(range(FPS))


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_a_list_that_was_not_fetched_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")
    for opened in (detect, open_it):
        with pytest.raises(ValueError, match=rf"{name}: it is a placeholder of Git LFS"):
            opened(tmp_path / name)
