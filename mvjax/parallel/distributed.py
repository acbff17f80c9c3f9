"""Several processes working on one run: how they find each other, agree, and end together."""

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 30  # a process that is silent for so long is dead, and the others stop
START_SECONDS = 300  # machines of a pod do not boot at the same moment


@contextlib.contextmanager
def initialized(start_seconds: float = START_SECONDS) -> Iterator[None]:
    """Makes this process one of the run's several, if it is; the first thing that `main` does.

    Which run it belongs to is found out in this order:

    1. MVJAX_COORDINATOR (host:port of process 0), MVJAX_PROCESS_COUNT and MVJAX_PROCESS_ID, when
       they are set, as `launch.local` does;
    2. else what JAX knows itself: a TPU pod (VMs and GKE, several slices), Slurm with srun, Open
       MPI. A job of one task there is a single process, which keeps all GPUs of its machine;
    3. else it is the only process, and nothing happens.

    Where the processes do not find each other, they end with one sentence and code 2. One that
    ends with an error does so at once, instead of waiting for the others as JAX would. The others
    are stopped by whoever started them (`launch.local`, srun, a JobSet), or by JAX after
    `HEARTBEAT_SECONDS` without a sign of life.

    Args:
        start_seconds: How long to wait for the other processes.

    Raises:
        ValueError: If only some of the three variables are set.
    """
    arguments = _arguments()
    if arguments is not None:
        waiting = threading.Timer(start_seconds, _give_up, [arguments, start_seconds])
        waiting.daemon = True
        waiting.start()
        try:
            jax.distributed.initialize(
                **arguments,
                # Later than the timer: JAX's own way to give up is a C++ stack trace.
                initialization_timeout=int(start_seconds) + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except ValueError as error:
            if arguments or "coordinator_address should be defined" not in str(error):
                raise
        finally:
            waiting.cancel()
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1 and not _is_success(error):
            atexit.register(_leave_at_once, error)
        raise


def everywhere(condition: bool) -> bool:
    """True if the condition holds in every process. All of them must ask."""
    if jax.process_count() == 1:
        return condition
    return bool(np.all(multihost_utils.process_allgather(np.array(condition))))


def _arguments() -> dict[str, str | int] | None:
    """For `jax.distributed.initialize`: {} lets it look for a cluster, None is a single process."""
    names = ("MVJAX_COORDINATOR", "MVJAX_PROCESS_COUNT", "MVJAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if given and len(given) < len(names):
        raise ValueError(f"{' and '.join(given)} is set; set all of {', '.join(names)}, or none.")
    if given:
        coordinator, count, index = given.values()
        return dict(
            coordinator_address=coordinator, num_processes=int(count), process_id=int(index)
        )
    tasks = os.environ.get("SLURM_NTASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE")
    return None if tasks == "1" else {}


def _give_up(arguments: dict[str, str | int], seconds: float) -> None:
    who = "this process"
    if arguments:
        who = "process {process_id} of {num_processes} (coordinator {coordinator_address})"
        who = who.format(**arguments)
    print(
        f"mvjax: {who} has not met all the others within {seconds:.0f} s; look whether they all "
        "run, and whether the coordinator's port on the machine of process 0 can be reached.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)  # the main thread is inside JAX, which cannot be interrupted


def _is_success(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and error.code in (None, 0)


def _leave_at_once(error: BaseException) -> None:
    # JAX's own hook at exit waits until all processes are done, which they never will be.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 2)
