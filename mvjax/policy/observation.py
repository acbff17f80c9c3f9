"""Observations, a policy's input, and the history that builds them from control steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Frames = np.ndarray | Mapping[str, np.ndarray]
"""Camera -> uint8 [t, any h, any w, 3]; or such an array alone, of the only camera."""
Frame = np.ndarray | Mapping[str, np.ndarray]
"""One moment of it: camera -> uint8 [h, w, 3], or such an array alone."""


@dataclass(frozen=True)
class Observation:
    """One query to the policy.

    Attributes:
        frames: camera -> uint8 [observed_frames, any h, any w, 3], oldest first, `clip.fps` apart,
            the last one now; of the policy's cameras (`Policy.cameras`) and no others. An array
            alone is that of the only camera.
        proprio: float32 [proprio_horizon, proprio_dim], oldest first, raw units.
        instruction: the task in words.
        future: the true frames that follow, `clip.fps` apart: future_frames of each camera of the
            predicted view; only in oracle mode, otherwise None.
        noise_key: names the query, as (episode, number of the query in it): what fresh noise
            (`sampler.fresh_noise`) is seeded by. Two queries of one name get equal noise.
        arranged: `frames` and `future` are finished pictures by view, as datasets are cut
            (`data_pipelines.cameras.arrange`), and not those of cameras.
        pending: what the robot still has to execute of its last chunk, from this moment on, float32
            [n, action_dim] in the units of the policy's actions; None at the beginning of an
            episode. Only read where `sampler.chunking` is not "none".
        delay: how many of these will be executed before the answer arrives.
    """

    frames: Frames
    proprio: np.ndarray
    instruction: str
    future: Frames | None = None
    noise_key: tuple[str, int] | None = None
    arranged: bool = False
    pending: np.ndarray | None = None
    delay: int = 0


Act = Callable[[Sequence[Observation]], np.ndarray]
"""A policy: n observations -> action chunks float32 [n, horizon, action_dim]."""


@dataclass(frozen=True)
class ObservationSpec:
    """How control steps become observations.

    Attributes:
        observed_frames: frames per observation (`clip.observed_frames`).
        fps: their rate in hertz (`clip.fps`).
        proprio_horizon: proprioceptive states per observation.
        proprio_fps: their rate in hertz.
        execute: control steps executed between two queries.
        delay: control steps from a query to its answer, in which the last chunk is executed.
    """

    observed_frames: int
    fps: float
    proprio_horizon: int
    proprio_fps: float
    execute: int
    delay: int = 0

    def __post_init__(self) -> None:
        for name in ("observed_frames", "proprio_horizon", "execute"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.delay <= self.execute:
            raise ValueError(
                f"The delay must be between 0 and execute = {self.execute} control steps, so that "
                f"an answer is there before the next query; got {self.delay}."
            )


def control_stride(control_hz: float, fps: float, what: str = "clip.fps") -> int:
    """Returns the control steps between two samples at `fps`, which must divide `control_hz`."""
    stride = round(control_hz / fps)
    if stride < 1 or abs(control_hz / fps - stride) > 1e-6:
        raise ValueError(
            f"The robot is controlled at {control_hz:g} Hz, which is not a whole multiple of "
            f"{what} = {fps:g}: set {what} to {control_hz:g} divided by a whole number."
        )
    return stride


class History:
    """The recent frames and states of one episode; frames that no query reads are not rendered.

    Queries are at control steps 0, execute, 2·execute, ... and each reads the frames 0, 1, ...,
    observed_frames - 1 strides before it. As in the training windows, the episode's first frame and
    state are repeated before its start. With execute 8 at 80 Hz and 20 fps, two new frames are
    rendered per query.
    """

    def __init__(self, spec: ObservationSpec, control_hz: float) -> None:
        self._spec = spec
        self._stride = control_stride(control_hz, spec.fps)
        self._proprio_stride = control_stride(control_hz, spec.proprio_fps, "policy_io.proprio.fps")
        self._step = -1
        self._frames: dict[int, Frame] = {}
        self._proprio: dict[int, np.ndarray] = {}

    def needs_frame(self, step: int) -> bool:
        """Returns whether any query will read the frame of control step `step`."""
        execute = self._spec.execute
        last_reader = step + (self._spec.observed_frames - 1) * self._stride
        next_query = -(-step // execute) * execute
        queries = range(next_query, last_reader + 1, execute)
        return any((query - step) % self._stride == 0 for query in queries)

    def record(self, proprio: np.ndarray, render: Callable[[], Frame]) -> Frame | None:
        """Records the next control step; the first call is step 0, before any action.

        Args:
            proprio: float32 [proprio_dim], raw units.
            render: returns camera -> uint8 [h, w, 3], or the array of the only camera; called only
                if a query will read this frame.

        Returns:
            What was rendered, if it was.
        """
        self._step += 1
        frame = render() if self.needs_frame(self._step) else None
        if frame is not None:
            self._frames[self._step] = frame
        self._proprio[self._step] = np.asarray(proprio, np.float32)
        for kept, count, stride in (
            (self._frames, self._spec.observed_frames, self._stride),
            (self._proprio, self._spec.proprio_horizon, self._proprio_stride),
        ):
            for step in [step for step in kept if step < self._step - (count - 1) * stride]:
                del kept[step]
        return frame

    def observation(
        self,
        instruction: str,
        future: Frames | None = None,
        noise_key: tuple[str, int] | None = None,
    ) -> Observation:
        """Returns the observation at the present control step, a multiple of `execute`."""
        if self._step < 0 or self._step % self._spec.execute:
            raise ValueError(
                f"The frames of a query at control step {self._step} were not kept: with execute = "
                f"{self._spec.execute}, queries must be at multiples of it."
            )
        frames = self._last(self._frames, self._spec.observed_frames, self._stride)
        proprio = self._last(self._proprio, self._spec.proprio_horizon, self._proprio_stride)
        return Observation(frames, proprio, instruction, future, noise_key)

    def _last(self, kept: dict[int, Frame], count: int, stride: int) -> Frames:
        steps = [max(0, self._step - back * stride) for back in reversed(range(count))]
        last = [kept[step] for step in steps]
        if isinstance(last[0], Mapping):
            return {camera: np.stack([frame[camera] for frame in last]) for camera in last[0]}
        return np.stack(last)
