"""The training loop, the same for both stages."""

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from mvjax.experiment import Experiment
from mvjax.models.network import merge
from mvjax.parallel import sharding_tree
from mvjax.training.checkpoint import Store
from mvjax.training.metrics import MetricsWriter, Pace, Record, read_records, traced_steps
from mvjax.training.objectives import Stage
from mvjax.training.preemption import Interrupt
from mvjax.training.prefetch import device_batches
from mvjax.training.restore import check_finished, describe, first_state, say
from mvjax.training.step import assemble, compile_step
from mvjax.training.validation import HeldOut

# The file that tells other programs that a training has reached its last step. Exit code 0 does
# not: a run that SIGTERM interrupted has saved everything and ends with it, too.
FINISHED = "finished"

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
            check_finished(workdir, reached, stored, description)
            _mark_finished(workdir, reached)
            return (read_records(workdir) or [{"step": reached}])[-1]
        _mark_finished(workdir, None)
        loader = iter(loader)
        state = first_state(experiment, stage, optimizer, abstract, store, loader, description)
        batches = device_batches(loader, sharding_tree(stage.batch_axes, mesh, experiment.rules))
        first = int(state.step)
        pace = Pace(stage, settings.batch_size, first)
        traces = workdir / "profile" if profile else None
        compiled, previous, levels = None, None, []
        with (
            contextlib.closing(
                MetricsWriter(workdir, first, config.wandb, description["config"])
            ) as writer,
            contextlib.closing(traced_steps(first + 1, settings.steps, traces)) as steps,
            _progress_bar(stage.name, first, settings.steps) as bar,
        ):
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
                    with jax.transfer_guard("disallow"):  # nothing may slip to the host unseen
                        state, metrics = compiled(state, stage.frozen, batch)
                    # Wait for the step before, not for this one: the devices always have work
                    # queued, and the host cannot run ahead and fill their memory with batches.
                    jax.block_until_ready(previous)
                    previous = metrics["loss"]
                pace.finished(reached - 1)
                if "by_level" in metrics:
                    levels.append(metrics.pop("by_level"))
                last = reached == settings.steps
                exit_code = None if last else interrupt.exit_code(reached)
                saving = last or exit_code is not None or reached % settings.checkpoint_every == 0
                looking = held_out is not None and reached % settings.sample_every == 0
                if saving or looking:  # both wait for this step, whose time is not theirs
                    with pace("step"):
                        jax.block_until_ready(previous)
                    pace.finished(reached)
                seen: Mapping[str, float] = {}
                if looking:
                    with pace("eval"):
                        seen, pictures = held_out(reached, merge(state.params, state.ema))
                        writer.show(reached, pictures)
                if last or looking or reached % settings.log_every == 0:
                    writer.log(reached, metrics, levels, {**seen, **pace.take()})
                    levels = []
                    _show(bar, writer.latest)
                if saving:
                    with pace("save"):
                        # A record must be on disk before the checkpoint that makes its step final.
                        writer.flush()
                        store.save(reached, state, position, description)
                bar.update()
                if exit_code is not None:
                    say(f"stopping at step {reached}, saved; run the same command to continue.")
                    raise SystemExit(exit_code)
    _mark_finished(workdir, settings.steps)
    assert writer.latest is not None  # the last step is always logged
    return writer.latest


def _mark_finished(workdir: Path, step: int | None) -> None:
    """Writes the step that a finished run has reached; None: the run goes on, or is another one."""
    if jax.process_index() != 0:
        return
    if step is None:
        (workdir / FINISHED).unlink(missing_ok=True)
    else:
        (workdir / FINISHED).write_text(f"{step}\n")


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
    """Puts the newest record beside the bar; stops a run whose gradient stays not finite."""
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
