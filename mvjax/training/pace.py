"""Where the time of a run goes, and how fast the devices are."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import jax
import psutil

from mvjax.training.flops import peak_flops
from mvjax.training.stage import Stage

MB = 2**20


class Pace:
    """Seconds per activity, and the speed of the steps, since the last `take`.

    Steps are counted when the devices have finished them, not when they are queued: the time of a
    step is that of data and step together, divided by the number finished meanwhile.
    """

    def __init__(self, stage: Stage, batch_size: int, step: int):
        """Starts at `step` of a run with this global batch size."""
        self._stage, self._batch_size = stage, batch_size
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._counted = self._finished = step
        peak = peak_flops(jax.devices()[0])
        self._peak = peak * jax.device_count() if peak else None

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Counts the time inside the block under `<activity>_seconds`."""
        start = time.perf_counter()
        yield
        self._spent[f"{activity}_seconds"] += time.perf_counter() - start

    def finished(self, step: int) -> None:
        """Notes that the devices have made this step."""
        self._finished = step

    def take(self) -> dict[str, float]:
        """What was measured, by name; `mfu` only where the devices' peak is known."""
        numbers, self._spent = dict(self._spent), defaultdict(float)
        steps, self._counted = self._finished - self._counted, self._finished
        seconds = numbers.get("data_seconds", 0.0) + numbers.get("step_seconds", 0.0)
        if steps and seconds:
            samples = steps * self._batch_size / seconds
            numbers |= {"seconds_per_step": seconds / steps, "samples_per_second": samples}
            if self._stage.tokens:
                numbers["tokens_per_second"] = samples * self._stage.tokens
            if self._stage.flops and self._peak:
                numbers["mfu"] = samples * self._stage.flops / self._peak
        return numbers | _memory()


def _memory() -> dict[str, float]:
    """The largest use of any device so far; of this process where the backend does not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return {"device_peak_mb": max(peaks) / MB}
    return {"host_mb": psutil.Process().memory_info().rss / MB}
