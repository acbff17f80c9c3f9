"""Videos look as a player shows them: rotation and mirroring, colours, and what cannot be shown."""

import re
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipelines.episode import Episode
from data_pipelines.inspect import inspect_dataset
from data_pipelines.inspect_text import describe
from data_pipelines.video import VideoFile, read_observed, write_video
from data_pipelines.video_index import FileRange

H, W = 32, 48
ONE = 1 << 16  # in the fixed-point numbers of a display matrix


def with_matrix(source: Path, target: Path, *matrix: float) -> Path:
    """A copy whose track is to be shown with the matrix (a, b, c, d)."""
    content = bytearray(source.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(value * ONE) for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(content)
    return target


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Frames whose four corners differ."""
    frame = np.zeros((H, W, 3), np.uint8)
    frame[:16, :24], frame[:16, 24:], frame[16:, :24] = 230, 150, 70
    path = tmp_path_factory.mktemp("rotation") / "plain.mp4"
    write_video(path, [frame, 255 - frame, frame], 10, crf=1)
    return path


def shown(frame: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """By the definition of the matrix: the point (x, y) appears at (ax + cy, bx + dy)."""
    y, x = np.indices(frame.shape[:2])
    columns, rows = a * x + c * y, b * x + d * y
    columns, rows = columns - columns.min(), rows - rows.min()
    out = np.zeros((rows.max() + 1, columns.max() + 1, 3), np.uint8)
    out[rows, columns] = frame
    return out


TURNED = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
MIRRORED = [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("matrix", TURNED + MIRRORED)
def test_rotation_and_mirroring_are_applied(plain, tmp_path, matrix):
    path = with_matrix(plain, tmp_path / "a.mp4", *matrix)
    stored = VideoFile(plain).read(range(3))
    expected = np.stack([shown(frame, *matrix) for frame in stored])
    video = VideoFile(path)
    np.testing.assert_array_equal(video.read(range(3)), expected)
    assert video.size == expected.shape[1:3] and not video.findings
    np.testing.assert_array_equal(read_observed(path, 1), expected[-1:])

    content = path.read_bytes()
    (tmp_path / "a.tar").write_bytes(b"x" * 512 + content)
    inside = VideoFile(FileRange(tmp_path / "a.tar", 512, len(content), "a.mp4"))
    np.testing.assert_array_equal(inside.read([1]), expected[1:2])

    episode = Episode("a", "set", "arm", ("go",), {"video": video.stream()}, ("video",))
    found = describe(inspect_dataset([episode], "set", "video_folder"))
    assert f"{expected.shape[2]}x{expected.shape[1]}" in found


def test_a_phone_turned_the_right_way_round(plain, tmp_path):
    """The iPhone's matrix for a video held upright: players turn it by 90 degrees clockwise."""
    turned = VideoFile(with_matrix(plain, tmp_path / "a.mp4", 0, 1, -1, 0)).read([0])[0]
    np.testing.assert_array_equal(turned, np.rot90(VideoFile(plain).read([0])[0], -1))


def test_a_rotation_that_is_no_multiple_of_90_degrees_is_refused(plain, tmp_path):
    for degrees in (45, 88.5, -20):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        path = with_matrix(plain, tmp_path / "a.mp4", c, s, -s, c)
        with pytest.raises(ValueError, match=rf"a\.mp4: .*rotated by {-degrees} degrees"):
            len(VideoFile(path))
    nearly = with_matrix(plain, tmp_path / "a.mp4", 0.003, 1, -1, 0.003)  # rounded by its writer
    assert VideoFile(nearly).size == (W, H)


# Colours, against the formulas of ITU-R BT.601, BT.709 and BT.2020.

WEIGHTS = {  # of red and blue, by the code points of H.273
    1: (0.2126, 0.0722),
    2: (0.299, 0.114),  # not specified: as FFmpeg writes it
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    9: (0.2627, 0.0593),
}
COLOURS = [(230, 30, 30), (30, 200, 40), (30, 40, 220), (180, 170, 60), (255, 255, 255), (0, 0, 0)]
SIDE = 32


def samples(colour, matrix: int, full: bool, bits: int) -> list[int]:
    """Y, Cb and Cr of a colour of 8 bits."""
    r, g, b = (value / 255 for value in colour)
    red, blue = WEIGHTS[matrix]
    y = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    if full:
        most, middle = 2**bits - 1, 2 ** (bits - 1)
        return [round(y * most), round(cb * most) + middle, round(cr * most) + middle]
    scale = 2 ** (bits - 8)
    return [round(v * scale) for v in (16 + 219 * y, 128 + 224 * cb, 128 + 224 * cr)]


def save_samples(
    path: Path, kind: str, rows: list[list[int]], codec="libx264", options=(), aspect=None, **tags
) -> Path:
    """Squares whose samples are the rows, encoded without loss; tags of the frames."""
    lossless = {"qp": "0", "preset": "ultrafast"} if codec == "libx264" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=lossless | dict(options))
        stream.width, stream.height, stream.pix_fmt = SIDE * len(rows), SIDE, kind
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i in range(2):
            frame = av.VideoFrame(stream.width, SIDE, kind)
            for name, value in tags.items():
                setattr(frame, name, value)
            for plane, values in zip(frame.planes, zip(*rows), strict=True):
                deep = np.uint16 if frame.format.components[0].bits > 8 else np.uint8
                line = np.repeat(np.array(values, deep), plane.width // len(rows))
                full = np.zeros((plane.height, plane.line_size // line.itemsize), deep)
                full[:, : len(line)] = line
                plane.update(full.tobytes())
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def squares(path: Path) -> np.ndarray:
    """The colour of each square."""
    return VideoFile(path).read([1])[0, SIDE // 2, SIDE // 2 :: SIDE].astype(int)


@pytest.mark.parametrize(
    ("kind", "matrix", "full", "bits"),
    [
        *(("yuv420p", matrix, full, 8) for matrix in (1, 2, 5, 6) for full in (False, True)),
        ("yuvj420p", 5, True, 8),
        *((f"yuv{layout}p", 1, full, 8) for layout in (422, 444) for full in (False, True)),
        *((f"yuv{layout}p10le", 1, full, 10) for layout in (420, 444) for full in (False, True)),
        ("yuv420p10le", 9, False, 10),
    ],
)
def test_colours_follow_the_matrix_and_the_range_of_the_file(tmp_path, kind, matrix, full, bits):
    rows = [samples(colour, matrix, full, bits) for colour in COLOURS]
    tags = dict(colorspace=matrix, color_range=2 if full else 1)
    path = save_samples(tmp_path / "a.mp4", kind, rows, **tags)
    assert np.abs(squares(path) - COLOURS).max() <= 3


def test_grey_and_rgb_videos_keep_their_values(tmp_path):
    greys = [[16 + round(v * 219 / 255)] for v in (0, 90, 131, 255)]
    found = squares(save_samples(tmp_path / "a.mp4", "gray", greys, color_range=1))
    assert np.abs(found - np.array([0, 90, 131, 255])[:, None]).max() <= 2
    rows = [[g, b, r] for r, g, b in COLOURS]
    path = save_samples(tmp_path / "a.avi", "gbrp", rows, "utvideo")
    np.testing.assert_array_equal(squares(path), COLOURS)


def test_what_looks_different_in_a_player_is_a_finding(tmp_path):
    rows = [samples(colour, 9, False, 10) for colour in COLOURS]
    deep = dict(kind="yuv420p10le", rows=rows, colorspace=9)
    plain = dict(kind="yuv420p", rows=[samples(colour, 1, False, 8) for colour in COLOURS])
    for name, given, words in (
        ("pq.mp4", dict(deep, color_trc=16, color_primaries=9), r"HDR \(PQ\)"),
        ("hlg.mkv", dict(deep, color_trc=18, color_primaries=9), r"HDR \(HLG\)"),
        ("wide.mp4", dict(deep, color_trc=14, color_primaries=9), "wide colours of BT.2020"),
        ("p3.mp4", dict(plain, color_trc=1, color_primaries=12), "wide colours of Display P3"),
        ("fields.mp4", dict(plain, options={"x264-params": "tff=1"}), "interlaced"),
        ("wide_pixels.mp4", dict(plain, aspect=Fraction(4, 3)), r"not square \(4:3\)"),
        ("alpha.mkv", dict(kind="bgra", rows=[[1]], codec="ffv1"), "transparent"),
        (
            "alpha.webm",  # of which the decoder gives the colours only
            dict(kind="yuva420p", rows=[[100, 90, 80, 0]], codec="libvpx-vp9", colorspace=1),
            "transparent",
        ),
        ("plain.mp4", dict(plain, colorspace=1, color_trc=1, color_primaries=1), None),
    ):
        video = VideoFile(save_samples(tmp_path / name, **given))
        episode = Episode("a", "set", "arm", ("go",), {"video": video.stream()}, ("video",))
        assert len(episode.findings) == (words is not None), name
        if words:
            assert re.search(words, episode.findings[0])


def test_an_observed_video_of_another_rate_or_kind_is_reported(tmp_path, caplog):
    rows = [samples(colour, 9, False, 10) for colour in COLOURS]
    path = save_samples(tmp_path / "a.mp4", "yuv420p10le", rows, color_trc=16)  # 10 per second
    read_observed(path, 5, fps=10)
    assert [message.split(": ")[1][:12] for message in caplog.messages] == ["video is HDR"]
    read_observed(path, 5, fps=5)
    assert "a.mp4 has 10 frames per second, but the model works at 5" in caplog.messages[-1]


def test_what_is_no_picture_of_8_bit_colours_is_refused(tmp_path):
    for kind in ("gray16le", "gray10le"):
        path = save_samples(tmp_path / "depth.mkv", kind, [[700], [900]], "ffv1")
        with pytest.raises(ValueError, match=rf"depth\.mkv: .*{kind}.* such as depth"):
            VideoFile(path).stream()
    odd = save_samples(tmp_path / "odd.mp4", "yuv444p", [[99, 120, 90]], colorspace=8)  # YCgCo
    with pytest.raises(ValueError, match=r"odd\.mp4: its colours cannot be .* matrix 8"):
        VideoFile(odd).stream()
