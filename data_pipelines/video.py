"""Video files through PyAV: exact random access by frame number, deterministic encoding.

`VideoFile` is what the sources give out. It asks a `VideoPool`, which the videos of a dataset
share, for the list of its file's frames (`video_index`) and for a `Decoder`.
"""

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipelines.atomic import replacing
from data_pipelines.episode import NANOSECONDS, Stream
from data_pipelines.frames import Frames
from data_pipelines.lru import LRU
from data_pipelines.video_index import (
    FileRange,
    VideoIndex,
    VideoPlace,
    open_video,
    read_index,
    unreadable,
)

DECODE_ON = 8  # frames that are cheaper to decode and drop than to seek over
INDICES_KEPT = 256  # files whose frame lists a pool remembers
GOP = 10  # a keyframe every 10 frames: any frame costs at most 10 decodes, at ~1.3x the size


class Decoder:
    """One open file; continues decoding where it stopped when that is cheaper than a seek.

    Safe to use from several threads, one at a time.
    """

    def __init__(self, path: VideoPlace, index: VideoIndex):
        self._path, self._index = path, index
        self._lock = threading.Lock()
        self._container = None
        self._to_rgb = VideoReformatter()  # keeps its tables from frame to frame
        self.seeks = 0

    def read(self, pts: list[int]) -> np.ndarray:
        """Frames at increasing presentation times: uint8 [k, h, w, 3].

        Raises:
            ValueError: if one cannot be decoded, or they differ in size.
        """
        with self._lock:
            try:
                if self._container is None:
                    self._open()
                first = self._frame(pts[0])
                frames = np.empty((len(pts), *first.shape), np.uint8)
                frames[0] = first
                for place, p in enumerate(pts[1:], 1):
                    frame = self._frame(p)
                    if frame.shape != first.shape:
                        reason = f"frames of {first.shape[:2]} and of {frame.shape[:2]}"
                        raise ValueError(unreadable(self._path, reason))
                    frames[place] = frame  # the only copy
                return frames
            except av.FFmpegError as error:
                self._close()
                raise ValueError(unreadable(self._path, error)) from error

    def close(self) -> None:
        """Closes the file; the next `read` opens it again."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def _open(self) -> None:
        self._container = open_video(self._path)
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1  # the loader's own threads fill the cores
        self._decoded = self._container.decode(self._stream)
        self._last: av.VideoFrame | None = None

    def _frame(self, pts: int) -> np.ndarray:
        """A view of one frame, valid until the next."""
        if self._last is None or self._last.pts != pts:
            self._advance(pts)
        picture = self._to_rgb.reformat(self._last, format="rgb24")
        plane, width = picture.planes[0], picture.width
        # FFmpeg pads rows to a multiple of its vector width.
        rows = np.frombuffer(plane, np.uint8).reshape(picture.height, plane.line_size)
        return rows[:, : 3 * width].reshape(picture.height, width, 3)

    def _advance(self, pts: int) -> None:
        """Decodes up to the frame at `pts`, which must be one of the index."""
        index = self._index
        last = self._last.pts if self._last is not None else index.pts[0] - 1
        key = index.keyframes[max(bisect_right(index.keyframes, pts) - 1, 0)]
        ahead = bisect_left(index.pts, key) - bisect_right(index.pts, last)
        if pts < last or ahead > DECODE_ON:
            self._container.seek(key, stream=self._stream, backward=True)
            self._decoded = self._container.decode(self._stream)
            self.seeks += 1
        # A frame that the index lists and the file does not give is an error: its neighbour in
        # its place would shift pictures against actions.
        found = next((f for f in self._decoded if f.pts is not None and f.pts >= pts), None)
        if found is None or found.pts != pts:
            self._close()
            reason = "it ends before its own frame list does"
            if found is not None:
                reason = f"frame at {pts} is missing, next is {found.pts}"
            raise ValueError(unreadable(self._path, reason))
        self._last = found


class _IndexOnce:
    """The frames of one file: threads that need the same file wait for it, others do not."""

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
    """What the videos of a dataset share: a bounded number of frame lists and of decoders.

    Safe to use from several threads; pickling keeps the limits and drops the rest.
    """

    def __init__(self, max_open: int = 16):
        self._indices = LRU[VideoPlace, _IndexOnce](INDICES_KEPT)
        self._decoders = LRU[VideoPlace, Decoder](max_open, Decoder.close)

    def index(self, path: VideoPlace) -> VideoIndex:
        """The frames of a file, from its packets (nothing is decoded)."""
        return self._indices.get(path, lambda: _IndexOnce(path)).get()

    def read(self, path: VideoPlace, pts: list[int]) -> np.ndarray:
        """Frames at increasing presentation times of one file: uint8 [k, h, w, 3]."""
        index = self.index(path)
        return self._decoders.get(path, lambda: Decoder(path, index)).read(pts)


class VideoFile(Frames):
    """A `FrameReader` over (a part of) a video file.

    Args:
        path: the file, or a range of bytes in one.
        start: seconds; the first frame is the one shown at this time.
        end: seconds, exclusive; None for the file's end.
        pool: shared by the videos of a dataset; a private one if not given.
        exact: take the frames with start <= time < end, to the nanosecond. Otherwise the part
            begins and ends half a frame earlier, for times that are sums of rounded durations.

    Raises:
        ValueError: at first use, if the file cannot be read or has no frames in that part.
    """

    def __init__(
        self,
        path: VideoPlace | str,
        start: float | Fraction = 0.0,
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
        """int64 [n] nanoseconds since the part's first frame."""
        pts = self._frames()
        base = self._pool.index(self.path).time_base
        scale, half = NANOSECONDS * base.numerator, base.denominator // 2
        return np.array([((p - pts[0]) * scale + half) // base.denominator for p in pts], np.int64)

    def stream(self) -> Stream:
        """The frames with their times.

        Raises:
            ValueError: as at any first use, or if two frames have the same time.
        """
        times = self.timestamps
        try:
            return Stream(times, self)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _read(self, numbers: list[int]) -> np.ndarray:
        pts = self._frames()
        return self._pool.read(self.path, [pts[number] for number in numbers])

    def _frames(self) -> Sequence[int]:
        """Presentation times of the part's frames."""
        if self._pts is None:
            index = self._pool.index(self.path)
            first = self._first_from(index, self._start)
            last = len(index.pts) if self._end is None else self._first_from(index, self._end)
            self._pts = index.pts[first:last]
            if not self._pts:
                end = "its end" if self._end is None else f"{float(self._end)} s"
                last_s = float(index.pts[-1] * index.time_base)
                raise ValueError(
                    f"{self.path}: no frames between {float(self._start)} s and {end}; the last "
                    f"one is at {last_s:.3f} s"
                )
        return self._pts

    def _first_from(self, index: VideoIndex, seconds: float | Fraction) -> int:
        """The number of the file's first frame at or after a time."""
        if self._exact:  # as integers of nanoseconds, which the timestamps are
            limit = Fraction(2 * round(seconds * NANOSECONDS) - 1, 2 * NANOSECONDS)
            return bisect_left(index.pts, limit / index.time_base)
        half = (index.pts[-1] - index.pts[0]) / max(len(index.pts) - 1, 1) / 2
        return bisect_left(index.pts, seconds / index.time_base - half)


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int, crf: int = 20) -> int:
    """Encodes frames as H.264 (yuv420p), atomically; equal frames give equal bytes.

    Args:
        path: the .mp4 to make; it appears only when complete.
        frames: uint8 [h, w, 3] each, even height and width.
        fps: frames per second.
        crf: x264's quality, 0 (lossless) to 51; 18-23 is usual.

    Returns:
        The number of frames written.

    Raises:
        ValueError: for no frames, or frames of a wrong type or size.
        OSError: if the folder cannot be written or the disk is full.
    """
    count = 0
    try:
        with replacing(path) as partial, av.open(str(partial), "w", format="mp4") as container:
            stream = None
            for frame in frames:
                if stream is None:
                    stream = _h264_stream(container, frame, fps, crf)
                size = [stream.height, stream.width, 3]
                if frame.dtype != np.uint8 or list(frame.shape) != size:
                    raise ValueError(
                        f"video frames must be uint8 {size}, got {frame.dtype} {list(frame.shape)}"
                    )
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture.pts, picture.time_base = count, Fraction(1, fps)
                container.mux(stream.encode(picture))
                count += 1
            if stream is None:
                raise ValueError(f"{path}: no frames were given to write")
            container.mux(stream.encode(None))
    except OSError as error:  # PyAV's write errors are OSErrors that name no file
        raise OSError(error.errno, f"{path}: cannot write the video: {error.strerror}") from error
    return count


def _h264_stream(container, frame: np.ndarray, fps: int, crf: int):
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"H.264 needs an even height and width, got {height}x{width}")
    # One thread, no scene-cut keyframes, and no macroblock tree, whose vector code reads past what
    # it wrote when pictures are tiny: the bytes depend on the frames alone.
    params = "scenecut=0:mbtree=0"
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "x264-params": params}
    stream = container.add_stream("libx264", rate=fps, options=options)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.gop_size, stream.max_b_frames = GOP, 0
    stream.codec_context.thread_count = 1
    return stream


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
        pass
    except OSError as error:
        raise ValueError(f"{path} is a damaged picture ({error}); copy it again.") from error
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
