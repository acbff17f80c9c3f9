"""Video files through PyAV: exact random access by frame number, deterministic encoding.

The sources return a `VideoFile` per video. The videos of a dataset share a `VideoPool`, which holds
the frame index (`video_index`) of each file and a bounded number of open `Decoder`s.
"""

import logging
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from PIL import Image, UnidentifiedImageError

from data_pipelines.atomic import replacing
from data_pipelines.display import orientation
from data_pipelines.episode import NANOSECONDS, Stream
from data_pipelines.frames import Frames, NotOpaqueColour, moments, to_rgb
from data_pipelines.lru import LRU
from data_pipelines.video_index import (
    FileRange,
    VideoIndex,
    VideoPlace,
    open_video,
    read_index,
    unreadable,
    video_streams,
)

log = logging.getLogger(__name__)

DECODE_ON = 8  # up to so many frames are decoded and dropped, which is cheaper than a seek
INDICES_KEPT = 256  # frame indices that a pool caches
GOP = 10  # a keyframe every 10 frames: any frame costs at most 10 decodes, at ~1.3x the size


class Decoder:
    """One open file; decodes on from its last frame where that is cheaper than a seek.

    Safe to use from several threads; a lock admits one at a time.
    """

    def __init__(self, path: VideoPlace, index: VideoIndex):
        self._path, self._index = path, index
        self._lock = threading.RLock()
        self._container = None
        self._to_rgb = VideoReformatter()  # one for all frames: making its tables takes time
        self.seeks = 0

    def read(self, pts: list[int]) -> np.ndarray:
        """Frames at increasing presentation times: uint8 [k, h, w, 3]; ValueError for damage."""
        with self._lock:
            try:
                if self._container is None:
                    self._open()
                frames = np.empty((len(pts), self._index.height, self._index.width, 3), np.uint8)
                for place, time in enumerate(pts):
                    frame = self._frame(time)
                    if frame.shape != frames.shape[1:]:
                        reason = f"frames of {frames.shape[1:3]} and of {frame.shape[:2]}"
                        raise ValueError(unreadable(self._path, reason))
                    frames[place] = frame  # the only copy
                return frames
            except av.FFmpegError as error:
                self.close()
                raise ValueError(unreadable(self._path, error)) from error

    def close(self) -> None:
        """Closes the file; the next `read` opens it again."""
        with self._lock:
            if self._container is not None:
                self._container.close()
                self._container = None

    def _open(self) -> None:
        self._container = open_video(self._path)
        self._stream = video_streams(self._container)[0]
        self._decoded = self._container.decode(self._stream)
        self._last: av.VideoFrame | None = None
        self._at: int | None = None  # the time of the last frame
        self._damaged = False  # the last frame, or one that it may refer to

    def _frame(self, pts: int) -> np.ndarray:
        """A view of one frame as it is to be shown, valid until the next."""
        if self._at != pts:
            self._advance(pts)
        rgb = self._to_rgb.reformat(self._last, format="rgb24")
        # FFmpeg pads rows to a multiple of its vector width.
        rows = np.frombuffer(rgb.planes[0], np.uint8).reshape(rgb.height, rgb.planes[0].line_size)
        stored = rows[:, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3)
        try:
            return orientation(self._last).apply(stored)
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from error

    def _advance(self, pts: int) -> None:
        """Decodes up to the frame at `pts`, which must be one of the index."""
        index = self._index
        last = self._at if self._at is not None else index.pts[0] - 1
        key = index.keyframes[max(bisect_right(index.keyframes, pts) - 1, 0)]
        ahead = bisect_left(index.pts, key) - bisect_right(index.pts, last)
        if pts < last or ahead > DECODE_ON:
            self._container.seek(key, stream=self._stream, backward=True)
            self._decoded = self._container.decode(self._stream)
            self._damaged = False
            self.seeks += 1
            try:
                return self._decode_to(pts, sought=True)
            except ValueError:
                # FFmpeg cannot seek everywhere in every container, such as MPEG-TS: from the start.
                self.close()
                self._open()
        self._decode_to(pts)

    def _decode_to(self, pts: int, sought: bool = False) -> None:
        # A frame that is in the index but not in the file is an error: returning its neighbour
        # instead would shift the images against the actions.
        latest = None
        for found in self._decoded:
            # H.264 may be refreshed bit by bit: players begin anywhere, but the pictures are wrong.
            if sought and latest is None and found.pict_type in (PictureType.P, PictureType.B):
                raise ValueError("its keyframe refers to frames before it")
            # FFmpeg shows a damaged frame all the same, and marks only that one.
            self._damaged = found.is_corrupt or (self._damaged and not found.key_frame)
            time = getattr(found, self._index.clock)
            if time is None or (latest is not None and time <= latest):
                self.close()
                raise ValueError(unreadable(self._path, "its frames are not in the order of time"))
            latest = time
            if latest >= pts:
                break
        if latest != pts:
            self.close()
            end = "the file ends" if latest is None or latest < pts else f"next is {latest}"
            raise ValueError(unreadable(self._path, f"frame at {pts} is missing, {end}"))
        if self._damaged:
            self.close()
            seconds = float(pts * self._index.time_base)
            raise ValueError(unreadable(self._path, f"the frame at {seconds:.3f} s is damaged"))
        self._last, self._at = found, pts


class _IndexOnce:
    """The index of one file. Only threads that need the same file wait while it is read."""

    def __init__(self, path: VideoPlace):
        self._path = path
        self._lock = threading.Lock()
        self._index: VideoIndex | None = None

    def get(self) -> VideoIndex:
        with self._lock:
            if self._index is None:
                self._index = read_index(self._path)
            return self._index


class VideoPool:
    """A bounded number of frame indices and open decoders, shared by the videos of a dataset.

    Safe to use from several threads; pickling keeps the limits and drops the entries.
    """

    def __init__(self, max_open: int = 16):
        self._indices = LRU[VideoPlace, _IndexOnce](INDICES_KEPT)
        self._decoders = LRU[VideoPlace, Decoder](max_open, Decoder.close)

    def index(self, path: VideoPlace) -> VideoIndex:
        """The frame index of a file; no frame is decoded for it."""
        return self._indices.get(path, lambda: _IndexOnce(path)).get()

    def read(self, path: VideoPlace, pts: list[int]) -> np.ndarray:
        """Frames at increasing presentation times of one file: uint8 [k, h, w, 3]."""
        index = self.index(path)
        return self._decoders.get(path, lambda: Decoder(path, index)).read(pts)


class VideoFile(Frames):
    """A `FrameReader` over a video file, or over a segment of it.

    Args:
        path: the file, or a range of bytes in one.
        start: of the segment, seconds as players count them; None for the first frame, which is
            often later than 0.
        end: of the segment, seconds, exclusive; None for the end of the file.
        pool: shared by the videos of a dataset; by default the video has its own.
        exact: select the frames with start <= time < end, to the nanosecond. By default a frame
            belongs to limits up to half of its shorter gap to a neighbour later, which suits times
            that are sums of rounded durations.

    Raises:
        ValueError: at first use, if the file cannot be read or the segment has no frames.
    """

    def __init__(
        self,
        path: VideoPlace | str,
        start: float | Fraction | None = None,
        end: float | Fraction | None = None,
        pool: VideoPool | None = None,
        exact: bool = False,
    ):
        self.path = self.where = path if isinstance(path, FileRange) else Path(path)
        self._start, self._end, self._exact = start, end, exact
        self._pool = pool or VideoPool(max_open=1)
        self._pts: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self._frames())

    @property
    def timestamps(self) -> np.ndarray:
        """int64 [n], nanoseconds since the first frame of the segment."""
        pts = self._frames()
        base = self._pool.index(self.path).time_base
        scale, half = NANOSECONDS * base.numerator, base.denominator // 2
        return np.array([((p - pts[0]) * scale + half) // base.denominator for p in pts], np.int64)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as shown, pixels."""
        index = self._pool.index(self.path)
        return index.height, index.width

    @property
    def codec(self) -> str:
        """FFmpeg's name of the codec."""
        return self._pool.index(self.path).codec

    @property
    def findings(self) -> tuple[str, ...]:
        """See `Episode.findings`."""
        return self._pool.index(self.path).findings

    def stream(self) -> Stream:
        """The frames with their timestamps."""
        times = self.timestamps
        try:
            return Stream(times, self)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _read(self, numbers: list[int]) -> np.ndarray:
        pts = self._frames()
        return self._pool.read(self.path, [pts[number] for number in numbers])

    def _frames(self) -> Sequence[int]:
        """Presentation times of the frames of the segment."""
        if self._pts is None:
            index = self._pool.index(self.path)
            first = 0 if self._start is None else self._first_from(index, self._start)
            last = len(index.pts) if self._end is None else self._first_from(index, self._end)
            self._pts = index.pts[first:last]
            if not self._pts:
                start = "the start" if self._start is None else f"{float(self._start)} s"
                end = "the end" if self._end is None else f"{float(self._end)} s"
                raise ValueError(
                    f"{self.path}: no frames between {start} and {end}; the last one is at "
                    f"{float(index.pts[-1] * index.time_base - index.zero):.3f} s"
                )
        return self._pts

    def _first_from(self, index: VideoIndex, seconds: float | Fraction) -> int:
        """The number of the first frame of the file at or after a time."""
        pts, seconds = index.pts, seconds + index.zero
        if self._exact:  # times are compared as timestamps, which are rounded to nanoseconds
            limit = Fraction(2 * round(seconds * NANOSECONDS) - 1, 2 * NANOSECONDS)
            return bisect_left(pts, limit / index.time_base)
        limit = seconds / index.time_base
        number = bisect_left(pts, limit)
        if number:
            # The gaps around a frame, not the mean gap of the file, which a pause makes longer.
            gap = min(np.diff(pts[max(number - 2, 0) : number + 1]), default=0)
            number -= bool(limit - pts[number - 1] <= gap / 2)
        return number


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int, crf: int = 20) -> int:
    """Encodes frames as `video_writer` does, and returns their number."""
    count = 0
    with video_writer(path, fps, crf) as add:
        for frame in frames:
            add(frame)
            count += 1
    return count


@contextmanager
def video_writer(path: Path, fps: int, crf: int = 20) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields `add(frame)` of an H.264 MP4 (yuv420p); equal frames give equal bytes.

    Frames are uint8 [h, w, 3], of even height and width.

    Args:
        path: the file to write; it appears only when it is complete.
        fps: frames per second.
        crf: x264's constant rate factor, 0 (lossless) to 51; 18-23 is usual.

    Raises:
        ValueError: if there are no frames, or one has a wrong type or size.
        OSError: if the folder cannot be written or the disk is full.
    """
    count = 0
    try:
        with replacing(path) as partial, av.open(str(partial), "w", format="mp4") as container:
            stream = None

            def add(frame: np.ndarray) -> None:
                nonlocal stream, count
                if stream is None:
                    stream = _h264_stream(container, frame, fps, crf)
                size = [stream.height, stream.width, 3]
                if frame.dtype != np.uint8 or list(frame.shape) != size:
                    raise ValueError(
                        f"video frames must be uint8 {size}, got {frame.dtype} {list(frame.shape)}"
                    )
                rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
                rgb.pts, rgb.time_base = count, Fraction(1, fps)
                container.mux(stream.encode(rgb))
                count += 1

            yield add
            if stream is None:
                raise ValueError(f"{path}: no frames were given to write")
            container.mux(stream.encode(None))
    except OSError as error:  # PyAV's write errors are OSErrors that name no file
        raise OSError(error.errno, f"{path}: cannot write the video: {error.strerror}") from error


def _h264_stream(container, frame: np.ndarray, fps: int, crf: int):
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"H.264 needs an even height and width, got {height}x{width}")
    # The bytes must depend on the frames alone: one thread, no keyframes at scene cuts, and no
    # macroblock tree, whose vector code reads uninitialised memory when frames are tiny.
    params = "scenecut=0:mbtree=0"
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "x264-params": params}
    stream = container.add_stream("libx264", rate=fps, options=options)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.gop_size, stream.max_b_frames = GOP, 0
    stream.codec_context.thread_count = 1
    return stream


_HEIF = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftypavif")  # in bytes 4 to 12


def read_observed(path: Path, most: int, fps: float | None = None) -> np.ndarray:
    """Reads an image, or the last frames of a video or an animation.

    Consecutive frames are taken, as published, so a video should have the model's frame rate.

    Args:
        path: an image or a video, recognised by its content.
        most: the largest number of frames, 1 + 4k; a shorter video gives as many of 1 + 4k frames
            as it has.
        fps: the model's frame rate; a video with another one is reported.

    Returns:
        uint8 [1 + 4k, h, w, 3].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither an image nor a video, or cannot be decoded or shown rightly.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no picture or video at {path}.")
    try:
        with Image.open(path) as picture:
            frames = []
            for number in _last(moments(picture), most):
                picture.seek(number)
                frames.append(to_rgb(picture))
            return np.stack(frames)
    except UnidentifiedImageError:
        pass
    except NotOpaqueColour as error:
        raise ValueError(f"{path}: {error}") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is a damaged picture ({error}); copy it again.") from error
    with path.open("rb") as file:
        if file.read(12)[4:] in _HEIF:  # FFmpeg would take one tile of it for a video
            raise ValueError(f"{path} is a HEIF picture; convert it to a JPEG or PNG.")
    video = VideoFile(path)
    try:
        times = video.timestamps
    except ValueError as error:
        raise ValueError(
            f"{path} is neither a picture (such as .png, .jpg) nor a video (such as .mp4) that can "
            f"be used: {str(error).removeprefix(f'{path}: ')}"
        ) from error
    for finding in video.findings:
        log.warning("%s: %s", path, finding)
    rate = (len(times) - 1) * NANOSECONDS / max(int(times[-1] - times[0]), 1)
    if fps and len(times) > 1 and not 0.9 < rate / fps < 1.1:
        log.warning(
            "%s has %.4g frames per second, but the model works at %.4g: it will see its motion at "
            "another speed. Change the rate, for example with ffmpeg -i %s -r %g.",
            *(path, rate, fps, path, fps),
        )
    return video.read(_last(len(video), most))


def _last(count: int, most: int) -> range:
    """The last 1 + 4k of `count` frames, at most `most`."""
    first = count - min(count, most)
    return range(first + (count - first - 1) % 4, count)
