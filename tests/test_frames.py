"""The base of the frame readers, decoding of images, resizing."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.episode import FrameReader
from data_pipelines.frames import ImageFrames, decode_image, resize_area


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
    reader = Stored([whole, encode(grey[:9]), whole[:300], b"", deep])
    assert reader.read([0]).shape == (1, 24, 26, 3)
    with pytest.raises(ValueError, match=r"/data/set: .*different sizes"):
        reader.read([0, 1])
    for number, what in ((2, ""), (3, ""), (4, "more than 8 bits")):
        with pytest.raises(ValueError, match=f"/data/set: image {number}: not a .*{what}"):
            reader.read([0, number])


def test_images_are_rotated_on_request(tmp_path):
    sideways = Image.Exif()
    sideways[0x0112] = 6
    picture = encode(np.zeros((4, 6, 3), np.uint8), exif=sideways)
    (tmp_path / "a.png").write_bytes(picture)
    for stored in (picture, tmp_path / "a.png"):
        assert decode_image(stored, "a").shape == (4, 6, 3)
        assert decode_image(stored, "a", upright=True).shape == (6, 4, 3)
    with pytest.raises(ValueError, match=r"b\.png: not a readable image"):
        decode_image(tmp_path / "b.png", tmp_path / "b.png")


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
