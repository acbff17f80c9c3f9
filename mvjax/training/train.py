"""The training loop, the same for all stages."""

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax

from data_pipelines.lock import run_lock
from data_pipelines.progress import Bar
from mvjax.experiment import Experiment
from mvjax.identity import digest
from mvjax.models.network import merge
from mvjax.parallel import sharding_tree
from mvjax.training.channels import BestEffort
from mvjax.training.checkpoint import Store, leaf_paths
from mvjax.training.metrics import MetricsWriter, Record, Throughput, read_records, traced_steps
from mvjax.training.objectives import Stage
from mvjax.training.preemption import GRACE, Interrupt, Overdue
from mvjax.training.prefetch import device_batches
from mvjax.training.resume import check_finished, describe, first_state, log_once
from mvjax.training.step import assemble, compile_step
from mvjax.training.validation import Validation

# The file that tells other programs that a run has made its last step. Exit code 0 does not: a run
# that SIGTERM interrupted has saved everything and ends with 0, too.
FINISHED = "finished"

MAX_SKIPPED_IN_A_ROW = 50
SAVING_PAUSES = (0.5, 5.0)  # seconds before the last checkpoint is tried again


class TrainingDiverged(RuntimeError):
    """The gradient has not been finite for many steps in a row."""


def train(
    experiment: Experiment,
    stage: Stage,
    loader: Any,
    workdir: Path,
    meta: Mapping[str, Any] | None = None,
    *,
    validation: Validation | None = None,
    profile: bool = False,
) -> Record:
    """Trains a stage in `workdir`, continuing the run that is already there.

    A run that is killed at any moment and started again gives the same losses as one that was not.

    Args:
        experiment: Its config has the sections mesh, rules, optimizer and training, init_from (a
            training directory or "") and wandb (a project at Weights & Biases or "").
        stage: The network and its loss.
        loader: Grain iterator (or IterDataset) over this process's part of each batch; endless.
        workdir: Receives checkpoints/, metrics.jsonl, tensorboard/, samples/ and profile/.
        meta: JSON-able facts to store beside the arrays, such as `data_fingerprint`.
        validation: Called every `training.sample_every` steps.
        profile: Trace a few steps into profile/.

    Returns:
        The record of the last step. A finished run returns it at once.

    Raises:
        SystemExit: After SIGTERM (0) or Ctrl-C (130), once the current step is saved.
        TrainingDiverged: If too many steps in a row had a gradient that was not finite.
        CheckpointMismatch: If a finished run had other data or other networks.
        OSError: If another process trains in `workdir`, or the disk is full.
    """
    config, settings, workdir = experiment.config, experiment.config.training, Path(workdir)
    mesh = experiment.mesh()
    optimizer, abstract, train_step = assemble(experiment, stage, mesh)
    description = describe(experiment, stage, meta or {})
    with (
        # Process 0 writes for all. Before the store, which clears half-written checkpoints away.
        run_lock(workdir) if jax.process_index() == 0 else nullcontext(),
        jax.set_mesh(mesh),
        Interrupt() as interrupt,  # also while the store waits for the last checkpoint
        Store(workdir, keep=settings.keep, keep_every=settings.keep_every) as store,
    ):
        newest = store.latest_step()
        # A finished run whose newest checkpoint is damaged is not finished: it repeats those steps.
        if newest is not None and newest >= settings.steps and (stored := store.meta(newest)):
            check_finished(workdir, newest, stored, description)
            _mark_finished(workdir, newest)
            return (read_records(workdir) or [{"step": newest}])[-1]
        _mark_finished(workdir, None)
        loader = iter(loader)
        state = first_state(experiment, stage, optimizer, abstract, store, loader, description)
        batches = device_batches(loader, sharding_tree(stage.batch_axes, mesh, experiment.rules))
        first = saved = int(state.step)
        _say_end_of_schedule(config.optimizer, settings.steps)
        failed = False  # the last attempt to save
        timer = Throughput(stage, settings.batch_size, first)
        traces = workdir / "profile" if profile else None
        measuring: AbstractContextManager = BestEffort("validation", "the run goes on without it")
        if jax.process_count() > 1:
            measuring = nullcontext()  # the others would wait for what one leaves out
        compiled, previous, levels, position = None, None, [], None
        with (
            closing(MetricsWriter(workdir, first, config.wandb, description["config"])) as writer,
            closing(traced_steps(first + 1, settings.steps, traces)) as steps,
            _progress_bar(stage.name, first, settings.steps) as bar,
        ):

            def save(step: int, final: bool) -> None:
                nonlocal saved, failed
                with timer("save"):
                    # A record must be on disk before the checkpoint that makes its step final.
                    writer.flush()
                    weights = merge(state.params, state.ema)
                    meta = {**description, "digest": digest(leaf_paths(weights))}
                    if stage.parts:  # by which other programs know the networks one by one
                        parts = {name: digest(leaf_paths(weights[name])) for name in stage.parts}
                        meta["part_digests"] = parts
                    for pause in (*SAVING_PAUSES, None) if final else (None,):
                        try:
                            store.save(step, state, position, meta)
                            if final and jax.process_count() == 1:
                                store.finish()
                            saved, failed = step, False
                            return
                        except OSError as error:
                            # The next checkpoint may fit on the disk again; two that fail stop the
                            # run, and so does the last one.
                            hopeless = final or failed or store.failing
                            if jax.process_count() > 1 or (pause is None and hopeless):
                                raise
                            log_once(f"step {step} cannot be saved ({error}); trying again later.")
                            failed = pause is None
                            time.sleep(pause or 0)

            for step in steps:
                try:
                    with timer("data"), interrupt.waiting():
                        batch, following = next(batches, (None, None))
                except Overdue:
                    if step - 1 > saved:
                        save(step - 1, final=True)
                    log_once(
                        f"stopping at step {step - 1}, saved: no data came for {GRACE:.0f} s after "
                        "the signal; run the same command to continue."
                    )
                    raise SystemExit(interrupt.exit_code(step)) from None
                if batch is None:
                    raise ValueError(
                        f"the loader ended after {step - 1} of {settings.steps} steps; it must "
                        "repeat."
                    )
                position = following
                if compiled is None:
                    with timer("compile"):
                        compiled = compile_step(train_step, state, stage.frozen, batch)
                with timer("step"):
                    # An accidental transfer to the host would stall the devices at every step.
                    with jax.transfer_guard("disallow"):
                        state, metrics = compiled(state, stage.frozen, batch)
                    # Wait for the step before, not for this one: the devices always have work
                    # queued, and the host cannot run ahead and fill their memory with batches.
                    jax.block_until_ready(previous)
                    previous = metrics["loss"]
                timer.finished(step - 1)
                # Every step counts in the error by noise level, not only those that are logged.
                if "by_level" in metrics:
                    levels.append(metrics.pop("by_level"))
                last = step == settings.steps
                exit_code = None if last else interrupt.exit_code(step)
                stopping = exit_code is not None
                saving = last or stopping or step % settings.checkpoint_every == 0
                # A run that is to stop has no time for it.
                validating = validation and step % settings.sample_every == 0 and not stopping
                if saving or validating:  # both wait for this step, so its time is not theirs
                    with timer("step"):
                        jax.block_until_ready(previous)
                    timer.finished(step)
                measured: Mapping[str, float] = {}
                if validating:
                    # Broken off, it is left out, and the wait for the next batch ends, too.
                    with timer("eval"), measuring, suppress(Overdue), interrupt.waiting():
                        measured, pictures = validation(step, merge(state.params, state.ema))
                        writer.show(step, pictures)
                if last or validating or step % settings.log_every == 0:
                    writer.log(step, metrics, levels, {**measured, **timer.take()})
                    levels = []
                    _show(bar, writer.latest)
                if saving:
                    save(step, final=last or stopping)
                bar.update()
                if stopping:
                    log_once(f"stopping at step {step}, saved; run the same command to continue.")
                    raise SystemExit(exit_code)
    # Only after the store is closed, which waits for the last checkpoint to be on disk.
    _mark_finished(workdir, settings.steps)
    assert writer.latest is not None  # the last step is always logged
    return writer.latest


def _say_end_of_schedule(optimizer: Any, steps: int) -> None:
    """Says from where on the learning rate stays as it is, as of a run that is made longer."""
    end = optimizer.decay_steps
    if optimizer.schedule != "constant" and end < steps:
        rate = optimizer.learning_rate * optimizer.final_fraction
        log_once(
            f"optimizer.decay_steps is {end}, but training.steps {steps}: after step {end} the "
            f"learning rate stays at {rate:g}{'' if rate else ', and nothing is learned'}."
        )


def _mark_finished(workdir: Path, step: int | None) -> None:
    """Writes the last step of a finished run; None removes the file of an unfinished one."""
    if jax.process_index() != 0:
        return
    if step is None:
        (workdir / FINISHED).unlink(missing_ok=True)
    else:
        (workdir / FINISHED).write_text(f"{step}\n")


def _progress_bar(name: str, first: int, steps: int) -> Bar:
    settings = dict(total=steps, initial=first, desc=name, unit="step")
    interval = 0.5 if sys.stderr.isatty() else 30
    return Bar(**settings, mininterval=interval, disable=jax.process_index() != 0)


def _show(bar: Bar, latest: Record | None) -> None:
    """Puts the newest record beside the bar; stops a run whose gradient stays non-finite."""
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
            f"the gradient was not finite for {latest['skipped_in_a_row']:.0f} steps in a row, up "
            f"to step {latest['step']}; lower optimizer.learning_rate, or look for bad values in "
            "the data."
        )
