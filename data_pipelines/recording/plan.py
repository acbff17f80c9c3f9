"""What a recording of demonstrations is, and the units of work it falls into."""

from dataclasses import dataclass

from data_pipelines.recording.suites import SUITES, RecordedSuite

VIDEO_STRIDE = 4  # control steps per frame of kind video: 80 Hz -> 20 fps


@dataclass(frozen=True)
class Unit:
    """Episodes `first` ... `first + count - 1` of a task."""

    task: str
    first: int
    count: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.task}-{self.first:05d}"


@dataclass(frozen=True)
class Recording:
    """What to record; two recordings with equal settings are equal byte for byte.

    Attributes:
        kind: of the suite's kinds: "robot", "video" or "hdf5".
        tasks: of the suite, e.g. "drawer-open-v3" or "object-2".
        episodes: successful demonstrations per task.
        noise: standard deviation of the noise on executed actions (labels stay clean).
        seed: with the task and the attempt's number, it decides an episode completely.
        height: of the frames, pixels.
        width: of the frames, pixels.
        unit_episodes: episodes recorded between two saves; of kind robot they share a video file.
        suite: the simulator, of `recording.suites.SUITES`.
    """

    kind: str
    tasks: tuple[str, ...]
    episodes: int
    noise: float = 0.1
    seed: int = 0
    height: int = 192
    width: int = 192
    unit_episodes: int = 4
    suite: str = "metaworld"

    def __post_init__(self):
        if self.suite not in SUITES:
            raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {self.suite!r}")
        kinds = self.simulator.kinds
        if self.kind not in kinds:
            raise ValueError(f"kind must be {' or '.join(map(repr, kinds))}, got {self.kind!r}")
        if not self.tasks:
            raise ValueError("no tasks were given to record")
        for task in self.tasks:
            self.simulator.check(task)
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"every task may be named once, got {', '.join(self.tasks)}")
        if self.episodes < 1 or self.unit_episodes < 1:
            raise ValueError(f"episodes and unit_episodes must be at least 1, got {self}")

    def units(self) -> list[Unit]:
        """The work, in the order of the finished dataset."""
        return [
            Unit(task, first, min(self.unit_episodes, self.episodes - first))
            for task in self.tasks
            for first in range(0, self.episodes, self.unit_episodes)
        ]

    @property
    def simulator(self) -> RecordedSuite:
        """What is recorded of the suite."""
        return SUITES[self.suite]

    @property
    def stride(self) -> int:
        """Control steps per frame."""
        return VIDEO_STRIDE if self.kind == "video" else 1

    @property
    def fps(self) -> int:
        """Frames per second."""
        return self.simulator.control_hz // self.stride


def picture_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) in pixels of a flag such as "480x640"; None of none.

    Raises:
        ValueError: if it is no size that video can have.
    """
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()) or int(height) % 2 or int(width) % 2:
        raise ValueError(
            f"--size must be height x width in pixels, both even, such as 480x640; got {text!r}"
        )
    return int(height), int(width)
