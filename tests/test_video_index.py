"""The lists of frames that MP4s keep, against what FFmpeg says packet by packet."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipelines import video_index
from data_pipelines.video import VideoFile
from data_pipelines.video_index import (
    FileRange,
    index_of_packets,
    index_of_tables,
    open_video,
    read_index,
)

COUNT = 130
EVEN, UNEVEN = range(COUNT), np.cumsum(np.random.default_rng(0).integers(1, 5, COUNT)).tolist()


def encode(path: Path, times, b_frames: int = 0, x264: str = "scenecut=0", **options) -> Path:
    """Frames at `times` / 30 s, each of another grey."""
    with av.open(str(path), "w", options=options) as container:
        keys = {"threads": "1", "x264-params": x264}
        stream = container.add_stream("libx264", rate=30, options=keys)
        stream.width = stream.height = 32
        stream.gop_size, stream.max_b_frames = 20, b_frames
        for i, at in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = int(at), Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def copy_packets(source: Path, target: Path, shift: int = 0, **options) -> Path:
    """The same packets, earlier by so many frames; those before 0 are hidden by an edit list."""
    with av.open(str(source)) as given, av.open(str(target), "w", options=options) as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        ticks = int(shift / 30 / given.streams.video[0].time_base)
        for packet in given.demux(given.streams.video[0]):
            if packet.size:
                packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
                packet.stream = stream
                container.mux(packet)
    return target


def both(place):
    """The index by the tables, and by the packets."""
    found = []
    for way in (index_of_tables, index_of_packets):
        with open_video(place) as container:
            found.append(way(place, container.streams.video[0]))
    return found


@pytest.mark.parametrize("front", [False, True], ids=["tables last", "tables first"])
@pytest.mark.parametrize("b_frames", [0, 3])
@pytest.mark.parametrize("times", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_the_tables_say_what_the_packets_say(tmp_path, times, b_frames, front):
    options = {"movflags": "faststart"} if front else {}
    path = encode(tmp_path / "a.mp4", times, b_frames, **options)
    tables, packets = both(path)
    assert tables == packets and len(tables.pts) == COUNT and len(tables.keyframes) >= 7
    seconds = np.array(tables.pts) * float(tables.time_base)
    np.testing.assert_allclose(seconds - seconds[0], (np.array(times) - times[0]) / 30, atol=1e-6)

    trimmed = copy_packets(path, tmp_path / "trimmed.mp4", shift=15)
    tables, packets = both(trimmed)
    assert tables == packets and tables.pts[0] == 0 > tables.keyframes[0]
    with open_video(trimmed) as container:  # the others are hidden
        assert [frame.pts for frame in container.decode(video=0)] == tables.pts.tolist()

    inside = tmp_path / "inside.bin"
    inside.write_bytes(b"x" * 700 + path.read_bytes() + b"y" * 900)
    tables, packets = both(FileRange(inside, 700, path.stat().st_size, "a.mp4"))
    assert tables == packets and len(tables.pts) == COUNT


def test_without_such_tables_the_packets_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(video_index, "_LONG", 10)
    path = encode(tmp_path / "a.mp4", EVEN, 2)
    whole = read_index(path)
    movflags = "frag_keyframe+empty_moov"
    for other in (
        copy_packets(path, tmp_path / "fragmented.mp4", movflags=movflags),
        copy_packets(path, tmp_path / "a.mkv"),
    ):
        tables, packets = both(other)
        assert tables is None and read_index(other).pts == packets.pts
        times = np.array(packets.pts) * packets.time_base
        np.testing.assert_allclose(
            (times - times[0]).astype(float),
            (np.array(whole.pts) * whole.time_base - whole.pts[0] * whole.time_base).astype(float),
            atol=1e-3,
        )


def test_a_file_whose_pictures_are_not_all_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(video_index, "_LONG", 10)
    path = encode(tmp_path / "a.mp4", EVEN, 2, movflags="faststart")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 200])
    with pytest.raises(ValueError, match=rf"a\.mp4: not a readable video .*\d+ of {COUNT} frames"):
        read_index(path)


def test_a_name_is_never_taken_for_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode(Path("a.mp4"), EVEN).rename("concat:a.mp4")
    encode(Path("a.mp4"), range(7))
    assert len(read_index(Path("concat:a.mp4")).pts) == COUNT
    with pytest.raises(ValueError, match=r"file:a\.mp4: .*No such file"):
        read_index(Path("file:a.mp4"))


def test_damaged_tables_are_no_other_error(tmp_path):
    """Whatever they say then, it is what FFmpeg says, or the packets are read."""
    content = encode(tmp_path / "a.mp4", EVEN, 2).read_bytes()
    start = content.index(b"moov")
    rng = np.random.default_rng(0)
    used = 0
    for number in range(60):
        bad = bytearray(content)
        bad[rng.integers(start, len(bad))] = rng.integers(256)
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(bad)
        try:
            with open_video(path) as container:
                if not container.streams.video:
                    continue
            tables, packets = both(path)
        except (av.FFmpegError, ValueError):
            continue
        if tables is not None:
            assert tables.pts == packets.pts
            used += 1
    assert used > 5


def test_every_frame_of_a_long_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(video_index, "_LONG", 10)
    video = VideoFile(encode(tmp_path / "a.mp4", EVEN, 2))
    greys = video.read(range(COUNT)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(greys, np.arange(COUNT), atol=3)
    np.testing.assert_allclose(video.read([77]).mean(), 77, atol=3)


def save_avi(path: Path, times, codec: str = "mjpeg", **options) -> Path:
    """As `encode`, at 10 frames per second; for a pause, an AVI stores empty chunks."""
    b_frames = options.pop("b_frames", 0)
    with av.open(str(path), "w", format=options.pop("format", "avi")) as container:
        stream = container.add_stream(codec, rate=10, options={"threads": "1", **options})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size, stream.max_b_frames = 12, b_frames
        for i, at in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 4 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = int(at), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut_end(path: Path, milliseconds: int) -> Path:
    """An edit list that ends earlier, as phones write when a video is trimmed."""
    content = bytearray(path.read_bytes())
    start = content.index(b"elst") + 12  # after the version and the number of entries
    content[start : start + 4] = milliseconds.to_bytes(4, "big")
    path.write_bytes(content)
    return path


def cut_at_open_gop(source: Path, target: Path) -> Path:
    """From the second keyframe on, with the frames before it whose references are lost."""
    with av.open(str(source)) as given, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        keys = 0
        for packet in given.demux(given.streams.video[0]):
            keys += packet.is_keyframe
            if packet.size and keys >= 2:
                packet.stream = stream
                container.mux(packet)
    return target


def with_hidden_frames(source: Path, target: Path) -> Path:
    """VP8 with frames that are never shown, as libvpx's second pass stores alternate references."""
    with av.open(str(source)) as given, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(given.demux(given.streams.video[0])):
            if not packet.size:
                continue
            if number % 12 == 5:
                data = bytearray(bytes(packet))
                data[0] &= ~0x10  # show_frame of RFC 6386, 9.1
                hidden = av.Packet(bytes(data))
                hidden.pts, hidden.dts = packet.pts, packet.dts
                hidden.time_base, hidden.stream = packet.time_base, stream
                container.mux(hidden)
            packet.stream = stream
            container.mux(packet)
    return target


def piped(path: Path) -> Path:
    """An AVI as FFmpeg writes it into a pipe: its length is not stated."""
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 4 + content[8:])
    return path


PAUSED = [*range(20), *range(50, 70)]


@pytest.mark.parametrize(
    ("count", "make"),
    [
        (40, lambda path: save_avi(path / "pause.avi", PAUSED)),
        (40, lambda path: save_avi(path / "b.avi", range(40), "mpeg4", b_frames=2)),
        (40, lambda path: save_avi(path / "h264.avi", PAUSED, "libx264")),
        (40, lambda path: save_avi(path / "pause.mkv", PAUSED, "libx264", format="matroska")),
        (40, lambda path: save_avi(path / "late.mp4", np.add(PAUSED, 7), "mpeg4", format="mp4")),
        (40, lambda path: save_avi(path / "late.ts", PAUSED, "libx264", format="mpegts")),
        (40, lambda path: save_avi(path / "start.ts", range(40), "libx264", format="mpegts")),
        (
            40,
            lambda path: save_avi(
                path / "a.mpg", range(40), "mpeg2video", b_frames=2, format="mpeg"
            ),
        ),
        (40, lambda path: piped(save_avi(path / "pipe.avi", range(40)))),
        (20, lambda path: cut_end(encode(path / "trimmed.mp4", range(40), 3), 20 * 1000 // 30)),
        (
            40,
            lambda path: with_hidden_frames(
                save_avi(path / "a.webm", range(40), "libvpx", format="webm"), path / "hidden.webm"
            ),
        ),
        (
            40,
            lambda path: cut_at_open_gop(
                encode(path / "a.mp4", range(60), 3, "scenecut=0:open-gop=1"), path / "cut.mp4"
            ),
        ),
    ],
    ids=(
        "avi,avi mpeg4,avi h264,mkv,late mp4,late ts,ts,mpg,piped avi,trimmed mp4,vp8,open gop"
    ).split(","),
)
def test_the_frames_are_those_that_a_player_shows(tmp_path, monkeypatch, count, make):
    path = make(tmp_path)
    for longest in (2000, 10):
        monkeypatch.setattr(video_index, "_LONG", longest)
        with open_video(path) as container:
            shown = [getattr(f, read_index(path).clock) for f in container.decode(video=0)]
        assert read_index(path).pts.tolist() == shown and len(shown) == count
    video = VideoFile(path)
    assert len(video.read(range(count))) == count
    if "PAUSED" in make.__code__.co_names:
        np.testing.assert_allclose(video.timestamps / 1e8, PAUSED, atol=0.02)


def test_a_truncated_file_is_refused_in_every_container(tmp_path):
    late = [*range(20), *range(400, 420)]  # the pause makes the mean gap longer than what is lost
    for path in (
        save_avi(tmp_path / "a.avi", late),
        save_avi(tmp_path / "a.mkv", late, "mpeg4", format="matroska"),
        save_avi(tmp_path / "a.mp4", late, "mpeg4", format="mp4", movflags="faststart"),
    ):
        content = path.read_bytes()
        assert len(read_index(path).pts) == 40
        (tmp_path / "in.tar").write_bytes(b"x" * 512 + content + b"y" * 512)
        assert len(read_index(FileRange(tmp_path / "in.tar", 512, len(content), "a")).pts) == 40
        ends = [len(content) * 2 // 3, *([len(content) - 9] if path.suffix != ".mp4" else ())]
        for end in ends:
            path.write_bytes(content[:end])
            with pytest.raises(ValueError, match=rf"{path.name}: not a readable video"):
                read_index(path)


def test_frames_that_an_avi_has_lost_do_not_move_the_later_ones(tmp_path):
    path = save_avi(tmp_path / "a.avi", PAUSED)
    content = bytearray(path.read_bytes())
    at = content.index(b"00dc", len(content) // 2)
    content[at : at + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.avi: not a readable video \(it has \d+ of 40 frames"):
        read_index(path)


def test_b_frames_in_an_avi_are_refused(tmp_path):
    """It has no place for their order, and FFmpeg's guess shows them in a wrong one."""
    path = save_avi(tmp_path / "a.avi", range(40), "libx264", b_frames=2)
    with pytest.raises(ValueError, match=r"a\.avi: an AVI does not store the order.* as an MP4"):
        VideoFile(path).stream()


def test_packed_b_frames_are_refused(tmp_path):
    """DivX: a packet holds two frames, and the next none, so that times go to the wrong frames."""
    source = save_avi(tmp_path / "a.avi", range(40), "mpeg4", b_frames=1)
    with av.open(str(source)) as given, av.open(str(tmp_path / "b.avi"), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        packets = [p for p in given.demux(given.streams.video[0]) if p.size]
        for number, packet in enumerate(packets):
            twin = bytes(packets[number + 1]) if number == 1 else b""
            new = av.Packet(bytes(packet) + twin)
            new.dts = new.pts = packet.dts
            new.time_base, new.stream = packet.time_base, stream
            new.is_keyframe = packet.is_keyframe
            container.mux(new)
    with pytest.raises(ValueError, match=r"b\.avi: .*packed B-frames.* as an MP4"):
        VideoFile(tmp_path / "b.avi").stream()


def test_of_several_video_streams_the_first_is_taken_and_that_is_said(tmp_path):
    first, second = encode(tmp_path / "1.mp4", range(30)), encode(tmp_path / "2.mp4", range(40))
    with (
        av.open(str(first)) as a,
        av.open(str(second)) as b,
        av.open(str(tmp_path / "two.mkv"), "w") as container,
    ):
        given = [file.streams.video[0] for file in (a, b)]
        streams = [container.add_stream_from_template(stream) for stream in given]
        for source, stream in zip(given, streams):
            for packet in source.container.demux(source):
                if packet.size:
                    packet.stream = stream
                    container.mux(packet)
    index = read_index(tmp_path / "two.mkv")
    assert len(index.pts) == 30 and "several video streams" in index.findings[0]
    assert not read_index(first).findings
