"""What an inspection finds out about an episode."""

from dataclasses import dataclass, field

import numpy as np

from data_pipelines.episode import NANOSECONDS, Stream


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        kind: under which it is counted.
        episode: id of the episode, or which data it concerns.
        text: what was found.
    """

    kind: str
    episode: str
    text: str


@dataclass(frozen=True)
class SeenStream:
    """A stream of one episode, or of a whole dataset.

    Attributes:
        shape: of one sample; () of a video whose size is not known.
        dtype: of the numbers.
        rate: samples per second; None for fewer than two.
        low: the least finite value of every dimension [prod(shape)]; None for video.
        high: the greatest.
        codec: of a video; "" for numbers and pictures.
        camera: whether it is video.
    """

    shape: tuple[int, ...]
    dtype: str
    rate: float | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    codec: str = ""
    camera: bool = False


@dataclass(frozen=True)
class Sample:
    """What a page shows of an episode.

    Attributes:
        pictures: camera -> small uint8 [h, w, 3] of its first, middle and last frame.
        curves: stream -> seconds [k] and values [k, d].
    """

    pictures: dict[str, list[np.ndarray]] = field(default_factory=dict)
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


@dataclass
class SeenEpisode:
    """An episode that was looked at; without streams if it could not be read."""

    id: str
    embodiment: str = ""
    instructions: tuple[str, ...] = ()
    seconds: float = 0.0
    streams: dict[str, SeenStream] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    sample: Sample | None = None

    def complain(self, kind: str, text: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem(kind, self.id, text))


def rate_of(stream: Stream) -> float | None:
    """Samples per second; None for fewer than two."""
    times = stream.timestamps
    if len(times) < 2:
        return None
    return (len(times) - 1) * NANOSECONDS / int(times[-1] - times[0])
