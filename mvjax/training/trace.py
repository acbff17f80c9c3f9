"""A profile of a few steps, for TensorBoard's or xprof's trace viewer."""

from collections.abc import Iterator
from pathlib import Path

import jax

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
