"""What a person points at, a picture or a video file, as the frames that a model observes."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipelines.transforms import resize_area
from data_pipelines.video import VideoFile


def read_observed(path: Path, most: int) -> np.ndarray:
    """A picture, or the last frames of a video: as many of 1 + 4k frames as there are.

    Args:
        path: a picture or a video, recognised by its content.
        most: frames at most, 1 + 4k; of a video with fewer, the largest 1 + 4k are taken.

    Returns:
        uint8 [1 + 4k, h, w, 3]. Frames are taken as they follow each other (as published), so a
        video should have the frame rate of the model.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither a picture nor a video, or cannot be decoded.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no picture or video at {path}.")
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)  # cameras store how they were held
            return np.asarray(upright.convert("RGB"))[None]
    except UnidentifiedImageError:
        return _last_frames(path, most)
    except OSError as error:
        raise ValueError(f"{path} is a damaged picture ({error}); copy it again.") from error


def cover(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales frames until they cover the size, without aliasing, and cuts out the centre.

    Source: Cosmos-Predict2, which treats its conditioning pictures so.

    Args:
        frames: uint8 [t, h, w, 3].
        height, width: of the output, pixels.

    Returns:
        uint8 [t, height, width, 3].
    """
    h, w = frames.shape[1:3]
    if height * w >= width * h:  # the height decides; the width is rounded up
        scaled = height, -(-w * height // h)
    else:
        scaled = -(-h * width // w), width
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return resize_area(frames, *scaled)[:, top : top + height, left : left + width]


def _last_frames(path: Path, most: int) -> np.ndarray:
    video = VideoFile(path)
    try:
        count = min(len(video), most)
        count -= (count - 1) % 4
        return video.read(range(len(video) - count, len(video)))
    except ValueError as error:
        raise ValueError(
            f"{path} is neither a picture (such as .png, .jpg) nor a video (such as .mp4) that can "
            "be read; give another file, or convert this one."
        ) from error
