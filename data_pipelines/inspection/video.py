"""The video of an episode looked at: does it decode, and does it show anything."""

from functools import lru_cache

import numpy as np
from PIL import Image

from data_pipelines.episode import Stream
from data_pipelines.inspection.found import Sample, SeenEpisode, SeenStream, rate_of
from data_pipelines.video import VideoFile
from data_pipelines.video_index import VideoPlace, open_video

_STILL = 4.0  # grey levels by which boxes of an unmoved picture differ, after compression
_BOX = 8  # pixels; the means of such boxes hide what compression does to single pixels
_BLACK = 4.0  # the mean grey level of a picture that shows nothing
_THUMBNAIL = (240, 180)  # pixels, at most
_DECODE_FRAMES = 16  # at a time when every frame is decoded


def look_at_video(
    seen: SeenEpisode, name: str, stream: Stream, sample: Sample | None, thorough: bool
) -> SeenStream:
    """Looks at one camera; what is wrong is noted in `seen`.

    Args:
        seen: the episode.
        name: of the camera.
        stream: its frames.
        sample: takes small pictures of the first, middle and last frame; None decodes nothing.
        thorough: decode every frame.

    Raises:
        ValueError: if frames cannot be decoded.
    """
    values, rate = stream.values, rate_of(stream)
    read = (lambda at: values[at]) if isinstance(values, np.ndarray) else values.read
    shape, codec = _facts(values.path) if isinstance(values, VideoFile) else ((), "")
    if isinstance(values, np.ndarray):
        shape = values.shape[1:]
    n = len(values)
    shown = sorted({0, n // 2, n - 1})
    pictures, first, difference, brightness = [], None, 0.0, 0.0
    if thorough:
        parts = [range(i, min(i + _DECODE_FRAMES, n)) for i in range(0, n, _DECODE_FRAMES)]
    else:
        parts = [shown] if sample is not None else []
    for part in parts:
        frames = np.asarray(read(list(part)))
        shape = frames.shape[1:]
        for at, frame in zip(part, frames):
            boxes = _boxes(frame)
            first = boxes if first is None else first
            difference = max(difference, float(np.abs(boxes - first).max()))
            brightness = max(brightness, float(frame.mean()))
            if at in shown and sample is not None:
                pictures.append(_small(frame))
    looked = f"all {n} frames" if thorough else f"{len(shown)} frames from first to last"
    if parts and brightness < _BLACK:
        seen.complain("black video", f"{name}: {looked} are black")
    elif parts and n > 2 and difference < _STILL:
        seen.complain("frozen video", f"{name}: {looked} are the same picture")
    if sample is not None:
        sample.pictures[name] = pictures
    return SeenStream(shape, "uint8", rate, codec=codec, camera=True)


@lru_cache(maxsize=256)  # files that hold many episodes are opened once
def _facts(place: VideoPlace) -> tuple[tuple[int, ...], str]:
    """Shape of the frames and name of the codec."""
    with open_video(place) as container:
        context = container.streams.video[0].codec_context
        return (context.height, context.width, 3), context.name


def _boxes(frame: np.ndarray) -> np.ndarray:
    grey = Image.fromarray(frame).convert("L")
    return np.asarray(grey.reduce(_BOX), np.int16)


def _small(frame: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(frame)
    picture.thumbnail(_THUMBNAIL)
    return np.asarray(picture)
