import pickle
import threading
from fractions import Fraction

import av
import numpy as np
import pytest

from data_pipelines.video import VideoFile, VideoPool, write_video

FPS = 80
COUNT = 55
FASTSTART = {"movflags": "faststart"}


def moving_blocks(count: int = COUNT, seed: int = 0) -> list[np.ndarray]:
    blocks = np.random.default_rng(seed).integers(0, 255, (8, 8, 3))
    return [
        np.kron(np.roll(blocks, i, 1), np.ones((16, 16, 1))).astype(np.uint8) for i in range(count)
    ]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "blocks.mp4"
    assert write_video(path, moving_blocks(), FPS) == COUNT
    return path


@pytest.fixture(scope="module")
def decoded(path):
    return VideoFile(path).read(range(COUNT))


def test_frames_come_back_nearly_as_written(decoded):
    error = np.abs(decoded.astype(int) - np.stack(moving_blocks())).mean()
    assert error < 6  # chroma is stored at half resolution


def test_timestamps_are_the_frame_rate_in_nanoseconds(path):
    video = VideoFile(path)
    assert len(video) == COUNT
    np.testing.assert_array_equal(video.timestamps, np.arange(COUNT, dtype=np.int64) * 12_500_000)


def test_random_access_gives_the_frames_of_a_sequential_pass(path, decoded):
    rng = np.random.default_rng(0)
    video = VideoFile(path)
    for index in rng.permutation(COUNT):
        np.testing.assert_array_equal(video.read([index])[0], decoded[index])
    indices = rng.integers(0, COUNT, 30)  # unordered, with repeats
    np.testing.assert_array_equal(video.read(indices), decoded[indices])


def test_a_sequential_pass_never_seeks(path):
    pool = VideoPool()
    video = VideoFile(path, pool=pool)
    for index in range(0, COUNT, 2):
        video.read([index, min(index + 1, COUNT - 1)])
    assert pool._decoders.get(path, lambda: None).seeks == 0


def test_a_part_of_a_file_is_a_video_of_its_own(path, decoded):
    # Times as a dataset stores them: sums of rounded durations.
    part = VideoFile(path, start=10 / FPS + 1e-5, end=30 / FPS - 1e-5)
    assert len(part) == 20
    assert part.timestamps[0] == 0
    np.testing.assert_array_equal(part.read(range(20)), decoded[10:30])
    with pytest.raises(IndexError, match="frame 20 asked for"):
        part.read([20])
    with pytest.raises(ValueError, match=r"no frames between 9\.0 s"):
        len(VideoFile(path, start=9.0))


def test_a_pause_moves_no_limit_of_a_segment(tmp_path):
    times = np.array([*range(10), *range(60, 70), *range(200, 210)])  # tenths of a second
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        for i, at in enumerate(times.tolist()):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = at + 5, Fraction(1, 10)  # the first is at 0.5 s
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    whole = VideoFile(tmp_path / "a.mp4")
    np.testing.assert_array_equal(whole.timestamps, times * 100_000_000)
    # Sums of rounded durations are a little early or late.
    for error in (0, 0.04, -0.04):
        for first, last in ((0, 10), (10, 20), (20, 30), (13, 17), (9, 11), (10, 11)):
            start, end = (0.5 + times[n] / 10 + error for n in (first, last - 1))
            part = VideoFile(tmp_path / "a.mp4", start, end + 0.1)
            assert len(part) == last - first
            shown = part.read(range(len(part))).mean((1, 2, 3))
            np.testing.assert_allclose(shown, 8 * np.arange(first, last), atol=3)
    assert len(VideoFile(tmp_path / "a.mp4", start=4.0)) == 20  # within a pause
    assert len(VideoFile(tmp_path / "a.mp4", end=0.7)) == 2


def test_equal_frames_give_equal_bytes_and_no_leftovers(path, tmp_path):
    write_video(tmp_path / "again.mp4", iter(moving_blocks()), FPS)
    assert (tmp_path / "again.mp4").read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.mp4"]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def frames():
        yield from moving_blocks(3)
        raise RuntimeError("the simulator failed")

    with pytest.raises(RuntimeError, match="the simulator failed"):
        write_video(tmp_path / "a.mp4", frames(), FPS)
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "a.mp4", [], FPS)
    with pytest.raises(ValueError, match="even height and width, got 63x64"):
        write_video(tmp_path / "a.mp4", [np.zeros((63, 64, 3), np.uint8)], FPS)
    with pytest.raises(ValueError, match=r"uint8 \[64, 64, 3\], got float32"):
        write_video(tmp_path / "a.mp4", [np.zeros((64, 64, 3), np.float32)], FPS)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/a\.mp4: cannot write the video"):
        write_video(tmp_path / "file/a.mp4", moving_blocks(2), FPS)


def test_a_damaged_file_is_named_in_one_error(path, tmp_path):
    content = path.read_bytes()
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"damaged\.mp4: not a readable video"):
        len(VideoFile(damaged))
    # A download that broke off: the index is in front and whole, the pictures are not.
    with av.open(str(path)) as source, av.open(str(damaged), "w", options=FASTSTART) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    content = damaged.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    damaged.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=r"damaged\.mp4: not a readable video"):
        VideoFile(damaged).read([COUNT - 1])
    with pytest.raises(ValueError, match=r"absent\.mp4: .*No such file"):
        len(VideoFile(tmp_path / "absent.mp4"))


def save(path, codec: str, frames, b_frames: int = 2, **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options={"threads": "1", **options})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.max_b_frames = "yuv420p", b_frames
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_no_picture_is_made_of_damaged_data(tmp_path, codec):
    """A decoder conceals what is damaged, in that picture and in those that refer to it."""
    path = save(tmp_path / "a.mp4", codec, moving_blocks(), 0, g="10")
    sound, content = VideoFile(path).read(range(COUNT)), path.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for at in np.linspace(0.2, 0.7, 5) * len(content):
        path.write_bytes(content[: int(at)] + rng.bytes(64) + content[int(at) + 64 :])
        video = VideoFile(path)
        for number in range(COUNT):
            try:
                picture = video.read([number])[0]
            except ValueError as error:
                assert "a.mp4: not a readable video" in str(error)
                refused += 1
            else:
                assert np.abs(picture.astype(int) - sound[number]).mean() < 1
    assert 5 <= refused < COUNT


def test_a_keyframe_that_is_none_is_not_begun_at(tmp_path):
    """H.264 that is refreshed column by column marks where a player may begin all the same."""
    wide = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).repeat(8, 0).repeat(8, 1)
    frames = [np.roll(wide.astype(np.uint8), -3 * i, 1) for i in range(60)]
    options = {"x264-params": "intra-refresh=1:keyint=12"}
    path = save(tmp_path / "a.mp4", "libx264", frames, 0, **options)
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for number in (57, 30, 59, 22, 54):
        np.testing.assert_array_equal(VideoFile(path).read([number])[0], decoded[number])


@pytest.mark.parametrize("size", [(18, 38), (50, 66)])  # rows that FFmpeg pads
def test_frames_are_those_of_pyav(tmp_path, size):
    rng = np.random.default_rng(0)
    path = tmp_path / "odd.mp4"
    write_video(path, [rng.integers(0, 255, (*size, 3), np.uint8) for _ in range(4)], FPS)
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.testing.assert_array_equal(
        VideoFile(path).read([2, 0, 2, 3]), np.stack(expected)[[2, 0, 2, 3]]
    )


def test_a_pool_remembers_few_files_and_reads_them_all(path, decoded, monkeypatch):
    monkeypatch.setattr("data_pipelines.video.INDICES_KEPT", 1)
    other = path.with_name("short.mp4")
    write_video(other, moving_blocks(20, seed=1), FPS)
    pool = VideoPool()
    videos = [VideoFile(path, pool=pool), VideoFile(other, pool=pool)]
    assert [len(video.timestamps) for video in videos] == [COUNT, 20]
    for index in (3, 40):
        np.testing.assert_array_equal(videos[0].read([index])[0], decoded[index])
        assert len(videos[1].read([index % 20])) == 1
    assert len(pool._indices._entries) == 1


def test_pickled_and_threaded_readers_agree(path, decoded):
    pool = VideoPool(max_open=1)
    other = path.with_name("other.mp4")
    write_video(other, moving_blocks(20, seed=1), FPS)
    videos = [VideoFile(path, pool=pool), VideoFile(other, pool=pool)]
    copy = pickle.loads(pickle.dumps(videos[0]))
    np.testing.assert_array_equal(copy.read([7]), decoded[[7]])
    expected = videos[1].read(range(20))
    wrong = []

    def read(seed: int):
        rng = np.random.default_rng(seed)
        for _ in range(15):
            i, j = rng.integers(0, COUNT, 4), rng.integers(0, 20, 4)
            if not (videos[0].read(i) == decoded[i]).all():
                wrong.append(i)
            if not (videos[1].read(j) == expected[j]).all():
                wrong.append(j)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(pool._decoders._entries) == 1
