"""Exact random access to the frames of one open video file, through PyAV."""

import threading
from bisect import bisect_left, bisect_right

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from data_pipelines.video_index import VideoIndex, VideoPlace, open_video, unreadable

DECODE_ON = 8  # frames that are cheaper to decode and drop than to seek over


class Decoder:
    """One open file; goes on decoding where it stopped when that is cheaper than a seek.

    Safe to use from several threads, one at a time.

    Args:
        path: the video.
        index: its frames.
    """

    def __init__(self, path: VideoPlace, index: VideoIndex):
        self._path = path
        self._index = index
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
        if self._last is None or self._last.pts != pts:
            self._advance(pts)
        picture = self._to_rgb.reformat(self._last, format="rgb24")
        plane, width = picture.planes[0], picture.width
        rows = np.frombuffer(plane, np.uint8).reshape(picture.height, plane.line_size)
        return rows[:, : 3 * width].reshape(picture.height, width, 3)

    def _advance(self, pts: int) -> None:
        index = self._index
        last = self._last.pts if self._last is not None else index.pts[0] - 1
        key = index.keyframes[max(bisect_right(index.keyframes, pts) - 1, 0)]
        ahead = bisect_left(index.pts, key) - bisect_right(index.pts, last)
        if pts < last or ahead > DECODE_ON:
            self._container.seek(key, stream=self._stream, backward=True)
            self._decoded = self._container.decode(self._stream)
            self.seeks += 1
        for frame in self._decoded:
            if frame.pts is not None and frame.pts >= pts:
                self._last = frame
                break
        else:
            self._close()
            raise ValueError(unreadable(self._path, "it ends before its own frame list does"))
        if self._last.pts != pts:
            found = self._last.pts
            self._close()
            raise ValueError(unreadable(self._path, f"frame at {pts} is missing, next is {found}"))
