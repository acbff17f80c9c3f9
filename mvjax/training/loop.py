"""The training loop, the same for both stages."""

import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from mvjax.checkpoints.store import Store
from mvjax.parallel.mesh import make_mesh
from mvjax.parallel.rules import make_rules, sharding_tree
from mvjax.training.feed import device_batches
from mvjax.training.interrupt import Interrupt
from mvjax.training.metrics import MetricsWriter, Record, read_records
from mvjax.training.optimizer import make_optimizer, make_schedule
from mvjax.training.stage import Batch, Stage
from mvjax.training.start import describe, say, start_state
from mvjax.training.state import TrainState, abstract_state
from mvjax.training.step import Step, compile_step, make_step

MAX_SKIPPED_IN_A_ROW = 50


class TrainingDiverged(RuntimeError):
    """The gradient has not been finite for many steps in a row."""


def train(
    config: Any, stage: Stage, loader: Any, workdir: Path, meta: Mapping[str, Any] | None = None
) -> Record:
    """Trains a stage in `workdir`, continuing whatever is already there.

    Killed at any moment and started again, a run gives the same losses as one that was not.

    Args:
        config: An `ml_collections.ConfigDict` with the sections (and usual values)
            mesh {data=-1, fsdp=1, context=1, tensor=1}; rules {} (overrides of the sharding rules);
            optimizer {learning_rate=1e-4, schedule="constant", warmup_steps=0, decay_steps=0,
            final_fraction=0.0, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, clip_norm=10.0};
            training {steps, batch_size, seed=0, ema_decay=0.0, log_every=50,
            checkpoint_every=1000, keep=2}; and init_from="" (a training directory).
        stage: What to train.
        loader: Grain iterator (or IterDataset) over this process's part of each batch; endless.
        workdir: Receives checkpoints/, metrics.jsonl and tensorboard/.
        meta: JSON-able facts to store beside the arrays (normalizer, `data_fingerprint`, ...).

    Returns:
        The last record of metrics.jsonl. A finished run returns it at once.

    Raises:
        SystemExit: After SIGTERM (0) or Ctrl-C (130), once the step reached is saved.
        TrainingDiverged: If too many steps in a row had a gradient that was not finite.
    """
    workdir, settings = Path(workdir), config.training
    mesh, rules = make_mesh(config.mesh), make_rules(config.rules)
    optimizer, schedule = make_optimizer(config.optimizer), make_schedule(config.optimizer)
    description = describe(config, stage, meta or {})
    with (
        jax.set_mesh(mesh),
        Store(workdir, keep=settings.keep) as store,
        Interrupt() as interrupt,
    ):
        reached = store.latest_step()
        if reached is not None and reached >= settings.steps:
            say(f"{workdir} is already trained to step {reached}.")
            return (read_records(workdir) or [{"step": reached}])[-1]
        loader = iter(loader)
        abstract = abstract_state(stage, optimizer, settings.ema_decay > 0, mesh, rules)
        state = start_state(config, stage, optimizer, abstract, store, loader, description)
        step = make_step(
            stage, optimizer, schedule, rules, seed=settings.seed, ema_decay=settings.ema_decay
        )
        batches = device_batches(loader, sharding_tree(stage.batch_axes, mesh, rules))
        with contextlib.closing(MetricsWriter(workdir, int(state.step))) as writer:

            def save(reached: int, state: TrainState, position: Any) -> None:
                # A record must be on disk before the checkpoint that makes its step final.
                writer.flush()
                store.save(reached, state, position, description)

            _run(step, state, stage, batches, settings, writer, interrupt, save)
    assert writer.latest is not None  # the last step is always logged
    return writer.latest


def _run(
    step: Step,
    state: TrainState,
    stage: Stage,
    batches: Iterator[tuple[Batch, Any]],
    settings: Any,
    writer: MetricsWriter,
    interrupt: Interrupt,
    save: Callable[[int, TrainState, Any], None],
) -> None:
    first, steps = int(state.step), int(settings.steps)
    clock, compiled, previous = _Clock(), None, None
    bar = tqdm(
        total=steps,
        initial=first,
        desc=stage.name,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=jax.process_index() != 0,
    )
    with bar:
        for reached in range(first + 1, steps + 1):
            with clock("data_seconds"):
                batch, position = next(batches, (None, None))
            if batch is None:
                raise ValueError(
                    f"the loader ended after {reached - 1} of {steps} steps; it must repeat."
                )
            if compiled is None:
                with clock("compile_seconds"):
                    compiled = compile_step(step, state, stage.frozen, batch)
            with clock("step_seconds"):
                state, metrics = compiled(state, stage.frozen, batch)
                # Wait for the step before, not for this one: the devices always have work queued,
                # and the host cannot run ahead and fill their memory with batches.
                jax.block_until_ready(previous)
                previous = metrics["loss"]
            last = reached == steps
            if last or reached % settings.log_every == 0:
                writer.log(reached, metrics, clock.take())
                _show(bar, writer.latest)
            exit_code = None if last else interrupt.exit_code(reached)
            if last or exit_code is not None or reached % settings.checkpoint_every == 0:
                with clock("save_seconds"):
                    save(reached, state, position)
            bar.update()
            if exit_code is not None:
                say(f"stopping at step {reached}, saved; run the same command to continue.")
                raise SystemExit(exit_code)


def _show(bar: tqdm, latest: Record | None) -> None:
    if latest is None:
        return
    bar.set_postfix(loss=f"{latest['loss']:.4g}", refresh=False)
    if latest["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
        raise TrainingDiverged(
            f"the gradient was not finite for {latest['skipped_in_a_row']:.0f} steps in a row "
            f"up to step {latest['step']}; lower optimizer.learning_rate, or look for bad values "
            "in the data."
        )


class _Clock:
    """Seconds spent per activity since the last `take`."""

    def __init__(self) -> None:
        self._spent: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._spent[activity] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        spent, self._spent = dict(self._spent), defaultdict(float)
        return spent
