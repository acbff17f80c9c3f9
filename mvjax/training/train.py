"""The training loop, the same for both stages."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from mvjax.experiment import Experiment
from mvjax.models.network import merge
from mvjax.parallel import sharding_tree
from mvjax.training.checkpoint import Store
from mvjax.training.metrics import MetricsWriter, Pace, Record, read_records
from mvjax.training.objectives import Batch, Stage
from mvjax.training.prefetch import device_batches
from mvjax.training.start import assemble, describe, say, say_finished, start_state
from mvjax.training.step import Step, TrainState, compile_step
from mvjax.training.validation import HeldOut

# The file that tells other programs that a training has reached its last step.
#
# Exit code 0 does not: a run that SIGTERM interrupted has saved everything and ends with it, too.


FILE = "finished"


def note(workdir: Path, step: int) -> None:
    """Writes the file; its content is the step."""
    if jax.process_index() == 0:
        (workdir / FILE).write_text(f"{step}\n")


def forget(workdir: Path) -> None:
    """Removes the file: the run goes on, or is another one."""
    if jax.process_index() == 0:
        (workdir / FILE).unlink(missing_ok=True)


# Stopping a run between two steps when the machine or the person asks for it.


class Interrupt:
    """Notes SIGTERM and Ctrl-C inside a `with` block instead of ending the process at once.

    A second signal ends a single process as usual. With several processes all must stop at the
    same step: JAX notices a SIGTERM to any of them and agrees on the step, and Ctrl-C counts as
    SIGTERM.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, object] = {}
        self._first: int | None = None

    def __enter__(self) -> "Interrupt":
        # JAX's own handler of SIGTERM must stay where there are several processes.
        several = jax.process_count() > 1
        for number in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._pass_on if several else self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def exit_code(self, step: int) -> int | None:
        """None to go on; otherwise stop after this step: 0 for SIGTERM, 130 for Ctrl-C.

        With several processes, each must ask after every step.
        """
        if jax.process_count() > 1:
            # JAX agrees on the largest number it was asked about, plus one. Before the first time
            # that is 1, so a run that continues at step 1000 must not ask about 1001: a signal
            # while it compiled would be lost.
            self._first = step if self._first is None else self._first
            count = step - self._first + 1
            return 0 if multihost_utils.reached_preemption_sync_point(count) else None
        if self._signal is None:
            return None
        return 130 if self._signal == signal.SIGINT else 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._restore()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGTERM)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


# A profile of a few steps, for TensorBoard's or xprof's trace viewer.


WARM_UP, TRACED = 3, 3


def traced_steps(first: int, last: int, folder: Path | None) -> Iterator[int]:
    """Yields the steps `first` to `last`; those after the warm-up are traced into `folder`.

    Every step runs inside a `StepTraceAnnotation`, which costs nothing unless something traces.
    The trace ends one step late: the loop waits for a step only after it has started the next.

    Args:
        first, last: Numbers of the first and the last step.
        folder: Where the trace goes; None for no trace.
    """
    start = max(first, min(first + WARM_UP, last - TRACED + 1)) if folder else last + 1
    tracing = False
    try:
        for step in range(first, last + 1):
            if step == start:
                jax.profiler.start_trace(str(folder))
                tracing = True
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                yield step
            if tracing and step == start + TRACED:
                jax.profiler.stop_trace()
                tracing = False
    finally:
        if tracing:
            jax.profiler.stop_trace()


MAX_SKIPPED_IN_A_ROW = 50


class TrainingDiverged(RuntimeError):
    """The gradient has not been finite for many steps in a row."""


def train(
    experiment: Experiment,
    stage: Stage,
    loader: Any,
    workdir: Path,
    meta: Mapping[str, Any] | None = None,
    *,
    held_out: HeldOut | None = None,
    profile: bool = False,
) -> Record:
    """Trains a stage in `workdir`, continuing whatever is already there.

    Killed at any moment and started again, a run gives the same losses as one that was not.

    Args:
        experiment: Its config has the sections (and usual values)
            mesh {data=-1, fsdp=1, context=1, tensor=1}; rules {} (overrides of the sharding rules);
            optimizer {learning_rate=1e-4, schedule="constant", warmup_steps=0, decay_steps=0,
            final_fraction=0.0, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, clip_norm=10.0,
            mu_dtype=""}; training {steps, batch_size, accumulate=1, seed=0, ema_decay=0.0,
            log_every=50, checkpoint_every=1000, keep=2, keep_every=0, sample_every=0}; init_from=""
            (a training directory); and wandb="" (a project at Weights & Biases).
        stage: What to train.
        loader: Grain iterator (or IterDataset) over this process's part of each batch; endless.
        workdir: Receives checkpoints/, metrics.jsonl, tensorboard/, samples/ and profile/.
        meta: JSON-able facts to store beside the arrays (normalizer, `data_fingerprint`, ...).
        held_out: Looked at every `training.sample_every` steps.
        profile: Whether to trace a few steps into profile/.

    Returns:
        The last record of metrics.jsonl. A finished run returns it at once.

    Raises:
        SystemExit: After SIGTERM (0) or Ctrl-C (130), once the step reached is saved.
        TrainingDiverged: If too many steps in a row had a gradient that was not finite.
        CheckpointMismatch: If a finished run had other data or other networks.
    """
    config, settings, workdir = experiment.config, experiment.config.training, Path(workdir)
    mesh = experiment.mesh()
    optimizer, abstract, step = assemble(experiment, stage, mesh)
    description = describe(experiment, stage, meta or {})
    with (
        jax.set_mesh(mesh),
        Store(workdir, keep=settings.keep, keep_every=settings.keep_every) as store,
        Interrupt() as interrupt,
    ):
        reached = store.latest_step()
        if reached is not None and reached >= settings.steps and (stored := store.meta(reached)):
            say_finished(workdir, reached, stored, description)
            note(workdir, reached)
            return (read_records(workdir) or [{"step": reached}])[-1]
        forget(workdir)
        loader = iter(loader)
        state = start_state(experiment, stage, optimizer, abstract, store, loader, description)
        batches = device_batches(loader, sharding_tree(stage.batch_axes, mesh, experiment.rules))
        first = int(state.step)
        writer = MetricsWriter(workdir, first, config.wandb, description["config"])
        steps = traced_steps(first + 1, settings.steps, workdir / "profile" if profile else None)
        with contextlib.closing(writer), contextlib.closing(steps):

            def save(reached: int, state: TrainState, position: Any) -> None:
                # A record must be on disk before the checkpoint that makes its step final.
                writer.flush()
                store.save(reached, state, position, description)

            def look(reached: int, state: TrainState) -> Mapping[str, float]:
                numbers, pictures = held_out(reached, merge(state.params, state.ema))
                writer.show(reached, pictures)
                return numbers

            _run(
                step,
                state,
                stage,
                batches,
                steps,
                settings,
                writer,
                interrupt,
                save,
                look if held_out else None,
            )
    note(workdir, settings.steps)
    assert writer.latest is not None  # the last step is always logged
    return writer.latest


def _run(
    step: Step,
    state: TrainState,
    stage: Stage,
    batches: Iterator[tuple[Batch, Any]],
    steps: Iterator[int],
    settings: Any,
    writer: MetricsWriter,
    interrupt: Interrupt,
    save: Callable[[int, TrainState, Any], None],
    look: Callable[[int, TrainState], Mapping[str, float]] | None,
) -> None:
    first, levels = int(state.step), []
    pace, compiled, previous = Pace(stage, settings.batch_size, first), None, None
    with _progress_bar(stage.name, first, settings.steps) as bar:
        for reached in steps:
            with pace("data"):
                batch, position = next(batches, (None, None))
            if batch is None:
                raise ValueError(
                    f"the loader ended after {reached - 1} of {settings.steps} steps; it must "
                    "repeat."
                )
            if compiled is None:
                with pace("compile"):
                    compiled = compile_step(step, state, stage.frozen, batch)
            with pace("step"):
                with jax.transfer_guard("disallow"):  # nothing may slip back to the host unseen
                    state, metrics = compiled(state, stage.frozen, batch)
                # Wait for the step before, not for this one: the devices always have work queued,
                # and the host cannot run ahead and fill their memory with batches.
                jax.block_until_ready(previous)
                previous = metrics["loss"]
            pace.finished(reached - 1)
            if "by_level" in metrics:
                levels.append(metrics.pop("by_level"))
            last = reached == settings.steps
            exit_code = None if last else interrupt.exit_code(reached)
            saving = last or exit_code is not None or reached % settings.checkpoint_every == 0
            looking = look is not None and reached % settings.sample_every == 0
            if saving or looking:  # both wait for this step, whose time is not theirs
                with pace("step"):
                    jax.block_until_ready(previous)
                pace.finished(reached)
            seen: Mapping[str, float] = {}
            if looking:
                with pace("eval"):
                    seen = look(reached, state)
            if last or looking or reached % settings.log_every == 0:
                writer.log(reached, metrics, levels, {**seen, **pace.take()})
                levels = []
                _show(bar, writer.latest)
            if saving:
                with pace("save"):
                    save(reached, state, position)
            bar.update()
            if exit_code is not None:
                say(f"stopping at step {reached}, saved; run the same command to continue.")
                raise SystemExit(exit_code)


def _progress_bar(name: str, first: int, steps: int) -> tqdm:
    return tqdm(
        total=steps,
        initial=first,
        desc=name,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=jax.process_index() != 0,
    )


def _show(bar: tqdm, latest: Record | None) -> None:
    if latest is None:
        return
    words = [f"loss {latest['loss']:.4g}"]
    if "seconds_per_step" in latest:
        words.append(f"{latest['seconds_per_step']:.3g} s/step")
    if "mfu" in latest:
        words.append(f"MFU {latest['mfu']:.1%}")
    bar.set_postfix_str(", ".join(words), refresh=False)
    if latest["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
        raise TrainingDiverged(
            f"the gradient was not finite for {latest['skipped_in_a_row']:.0f} steps in a row "
            f"up to step {latest['step']}; lower optimizer.learning_rate, or look for bad values "
            "in the data."
        )
