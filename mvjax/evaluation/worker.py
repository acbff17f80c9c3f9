"""One simulator process: plays episodes and asks the evaluating process for actions.

`mvjax.evaluation.rollout` starts the process and talks to it over a pipe. It receives a `Job`, then
each `Order` and chunk of actions, and sends a `Query`, an `Outcome` or a `Failure`. It imports no
jax: accelerators belong to the evaluating process, and a worker should start in a second. It may
run in another Python (3.11 or newer) with another numpy, as some simulators need: messages consist
of plain values, arrays and the classes of this file and of `mvjax.policy.observation` only.
"""

import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from mvjax.evaluation.suites.suite import MakeSimulator, Simulator
from mvjax.policy.observation import History, Observation, ObservationSpec, control_stride


@dataclass(frozen=True)
class Job:
    """The settings of all episodes of a worker, as `run_rollouts` takes them."""

    make_simulator: MakeSimulator
    spec: ObservationSpec
    mode: str
    cameras: Mapping[str, str]
    predicted: Sequence[str]
    oracle_frames: int
    max_steps: int | None


@dataclass(frozen=True)
class Order:
    """The next episode to play; `video` is the file to record it in, or None."""

    task: str
    seed: int
    video: str | None  # not a Path: its pickle cannot be sent between Python 3.13 and older ones


@dataclass(frozen=True)
class Query:
    """An observation to be answered with a chunk of actions."""

    observation: Observation


@dataclass(frozen=True)
class Outcome:
    """An episode that ended."""

    success: bool
    steps: int


@dataclass(frozen=True)
class Failure:
    """An exception in the simulator as text: its traceback, or a message for the user."""

    text: str


def serve(file_descriptor: int) -> None:
    """Runs the worker on its end of the pipe until the other end closes."""
    connection = Connection(file_descriptor)
    simulator, task = None, None
    try:
        job: Job = connection.recv()
        while True:
            order: Order = connection.recv()
            if order.task != task:
                if simulator is not None:
                    simulator.close()
                try:
                    simulator, task = job.make_simulator(order.task), order.task
                # No such task, no OpenGL, no package: a person needs the sentence, not a traceback.
                except (ValueError, RuntimeError, ImportError) as error:
                    return connection.send(Failure(str(error)))
            connection.send(play(simulator, order, job, connection))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the evaluation ended, or was killed
    except Exception:
        connection.send(Failure(traceback.format_exc()))
    finally:
        if simulator is not None:
            simulator.close()


def play(simulator: Simulator, order: Order, job: Job, connection: Connection) -> Outcome:
    """Plays one episode to success or the step limit."""
    simulator.reset(order.seed)
    history = History(job.spec, simulator.control_hz)
    stride = control_stride(simulator.control_hz, job.spec.fps)
    asks = job.mode in ("policy", "oracle")
    recorded: list[np.ndarray] = []
    queries = itertools.count()
    success, steps, max_steps = False, 0, job.max_steps or simulator.max_steps

    def look() -> dict[str, np.ndarray]:
        return {name: simulator.render(camera) for name, camera in job.cameras.items()}

    def observe() -> None:
        frame = history.record(simulator.proprio(), look) if asks else None
        if order.video is not None and steps % stride == 0:
            recorded.append(_side_by_side(look() if frame is None else frame))

    def ask() -> np.ndarray:
        future = None
        if job.mode == "oracle":  # the future under the expert
            shown = {name: job.cameras[name] for name in job.predicted}
            ahead = simulator.lookahead(job.oracle_frames * stride, stride, [*shown.values()])
            future = {name: ahead[camera] for name, camera in shown.items()}
        # By the episode alone: its noise is the same in any worker, and after a resume.
        name = f"{order.task}/{order.seed}", next(queries)
        connection.send(Query(history.observation(simulator.instruction, future, name)))
        return connection.recv()

    observe()
    for action in _actions(simulator, job, ask):
        success, steps = bool(simulator.step(action)), steps + 1
        if success or steps >= max_steps:
            break
        observe()
    if order.video is not None:
        from data_pipelines.video import write_video  # PyAV is needed only for recordings

        recorded.append(_side_by_side(look()))  # how it ended
        Path(order.video).parent.mkdir(parents=True, exist_ok=True)
        write_video(Path(order.video), recorded, round(job.spec.fps))
    return Outcome(success, steps)


def _side_by_side(frame: Mapping[str, np.ndarray]) -> np.ndarray:
    """The pictures of all cameras in one row."""
    if len(frame) == 1:
        return next(iter(frame.values()))
    from data_pipelines.frames import side_by_side  # Pillow is needed only for recordings

    return side_by_side([*frame.values()])


def _actions(simulator: Simulator, job: Job, ask: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
    """The endless actions of an episode, each computed when it is needed."""
    if job.mode == "none":
        yield from itertools.repeat(np.zeros(simulator.action_dim, np.float32))
    while job.mode == "expert":
        yield simulator.expert_action()
    execute, delay = job.spec.execute, job.spec.delay
    chunk = ask()  # the robot waits for the first answer
    yield from chunk[:execute]
    while True:
        before, chunk = chunk, ask()  # asked now, and there `delay` steps later
        yield from before[execute : execute + delay]
        yield from chunk[delay:execute]
