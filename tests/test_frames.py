"""The base of the frame readers, decoding of images, resizing."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines.episode import FrameReader
from data_pipelines.frames import ImageFrames, decode_image, resize_area
from data_pipelines.video import read_observed


def encode(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png", **options)
    return file.getvalue()


class Stored(ImageFrames):
    """Images in memory that count how often they are decoded."""

    def __init__(self, pictures: list[bytes]):
        super().__init__("/data/set", len(pictures))
        self.pictures, self.asked = pictures, []

    def encoded(self, number: int) -> bytes:
        self.asked.append(number)
        return self.pictures[number]


def test_each_image_is_decoded_once_in_any_order():
    frames = np.random.default_rng(0).integers(0, 256, (6, 3, 5, 3), np.uint8)
    reader = Stored([encode(frame) for frame in frames])
    assert isinstance(reader, FrameReader) and len(reader) == 6
    for indices in ([4, 0, 4, 2], [1, 2], np.array([5]), range(6)):
        np.testing.assert_array_equal(reader.read(indices), frames[indices])
    assert reader.asked == [0, 2, 4, 1, 2, 5, *range(6)]
    for wrong in ([0, 6], [-1]):
        with pytest.raises(IndexError, match=rf"/data/set: frame {wrong[-1]} .* there are 6"):
            reader.read(wrong)
    with pytest.raises(ValueError, match="/data/set: no frame indices"):
        reader.read([])


def test_images_that_cannot_be_frames_are_named():
    grey = np.random.default_rng(0).integers(0, 256, (24, 26), np.uint8)
    whole, deep = encode(grey), encode(grey.astype(np.uint16))
    moving = encode(grey, save_all=True, append_images=[Image.fromarray(255 - grey)])
    reader = Stored([whole, encode(grey[:9]), whole[:300], b"", deep, moving])
    assert reader.read([0]).shape == (1, 24, 26, 3)
    with pytest.raises(ValueError, match=r"/data/set: .*different sizes"):
        reader.read([0, 1])
    whys = "not a readable", "not a readable", "more than 8 bits.*depth", "an animation of 2 frames"
    for number, why in enumerate(whys, 2):
        with pytest.raises(ValueError, match=f"/data/set: image {number}: .*{why}"):
            reader.read([0, number])


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_images_are_shown_as_their_exif_tag_says(tmp_path, kind):
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :24], stored[16:, 24:] = 250, 120  # top left, and bottom right
    upright = {  # by the EXIF standard: where the stored first row and first column are
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
    }
    for tag, expected in upright.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        Image.fromarray(stored).save(tmp_path / "a", kind, exif=exif, quality=95)
        found = decode_image((tmp_path / "a").read_bytes(), "a").astype(int)
        assert found.shape == expected.shape
        assert np.abs(found - expected)[4:-4, 4:-4].mean() < 4
        assert read_observed(tmp_path / "a", 5).shape == (1, *expected.shape)
    with pytest.raises(ValueError, match=r"b\.png: not a readable image"):
        decode_image(tmp_path / "b.png", tmp_path / "b.png")


def test_colours_are_those_that_viewers_show(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (24, 26, 3), np.uint8)
    picture = Image.fromarray(colours)
    grey = np.repeat(np.asarray(picture.convert("L"))[..., None], 3, -1)
    deep = Image.fromarray(colours.astype(np.uint16)[..., 0] * 256)
    seen = picture.convert("RGBA")
    seen.putalpha(7)  # one value for all says nothing
    for name, stored, expected in (
        ("rgba.png", seen, colours),
        ("grey.png", picture.convert("L"), grey),
        ("one_bit.png", Image.fromarray(grey[..., 0] > 99), np.where(grey > 99, 255, 0)),
        ("palette.png", Image.fromarray(grey[..., 0]).convert("P"), grey),
        ("cmyk.tiff", picture.convert("CMYK"), colours),
        ("one.gif", Image.fromarray(grey[..., 0]), grey),
    ):
        stored.save(tmp_path / name)
        np.testing.assert_array_equal(decode_image(tmp_path / name, name), expected)
        np.testing.assert_array_equal(read_observed(tmp_path / name, 5), expected[None])
    save_png_of_16_bits(tmp_path / "deep.png", colours.astype(np.uint16) * 256 + 77)
    np.testing.assert_array_equal(decode_image(tmp_path / "deep.png", "a"), colours)

    seen.putalpha(Image.fromarray(grey[..., 0]))
    holes = picture.quantize(16)
    holes.info["transparency"] = 3
    for name, stored, why in (
        ("depth.png", deep, "more than 8 bits"),
        ("depth.tiff", deep, "more than 8 bits"),
        ("float.tiff", Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32)[None]), "more than"),
        ("holes.png", seen, "transparent"),
        ("holes.gif", holes, "transparent"),
        ("grey_holes.png", seen.convert("LA"), "transparent"),
    ):
        stored.save(tmp_path / name)
        for read in (lambda path: decode_image(path, path), lambda path: read_observed(path, 5)):
            with pytest.raises(ValueError, match=f"{name}: .*{why}"):
                read(tmp_path / name)


def save_png_of_16_bits(path, values: np.ndarray) -> None:
    """Colours [h, w, 3], which Pillow reads but does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + zlib.crc32(name + data).to_bytes(4)

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_an_animation_is_observed_like_a_video(tmp_path, kind):
    first, *others = (Image.new("RGB", (32, 16), (30 * i,) * 3) for i in range(7))
    first.save(tmp_path / "a", kind, save_all=True, append_images=others, duration=100)
    for most, levels in ((1, [180]), (5, [60, 90, 120, 150, 180]), (9, [60, 90, 120, 150, 180])):
        found = read_observed(tmp_path / "a", most).mean((1, 2, 3))
        np.testing.assert_allclose(found, levels, atol=3)


def test_a_heif_picture_is_not_taken_for_a_video(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(ValueError, match=r"a\.heic is a HEIF picture"):
        read_observed(tmp_path / "a.heic", 5)


@pytest.mark.parametrize("size", [(192, 192, 64, 64), (96, 60, 24, 20), (480, 640, 12, 16)])
def test_whole_factors_are_exact_box_means(size):
    h, w, height, width = size
    frames = np.random.default_rng(0).integers(0, 256, (2, h, w, 3), dtype=np.uint8)
    boxes = frames.reshape(2, height, h // height, width, w // width, 3).mean((2, 4))
    assert np.abs(resize_area(frames, height, width) - boxes).max() <= 0.5


@pytest.mark.parametrize("size", [(64, 64), (72, 50), (250, 333)])
def test_constant_frames_stay_constant(size):
    frames = np.full((1, 192, 192, 3), 201, np.uint8)
    resized = resize_area(frames, *size)
    assert resized.shape == (1, *size, 3)
    assert np.all(resized == 201)


def test_fractional_factors_do_not_alias():
    checkers = (np.indices((200, 200)).sum(0) % 2 * 255).astype(np.uint8)
    frames = np.repeat(checkers[None, ..., None], 3, axis=-1)
    inner = resize_area(frames, 64, 72)[0, 2:-2, 2:-2].astype(int)
    assert np.abs(inner - 127.5).max() < 16  # picking every third pixel would give 0 and 255


def test_same_size_is_not_copied():
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    assert resize_area(frames, 8, 8) is frames


def test_float_frames_are_refused():
    with pytest.raises(ValueError, match="float64"):
        resize_area(np.zeros((1, 8, 8, 3)), 4, 4)
