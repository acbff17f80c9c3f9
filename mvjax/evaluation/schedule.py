"""Which worker plays which episode: workers stay on a task, since changing it costs a second."""

from collections import Counter, deque
from collections.abc import Iterable

from mvjax.evaluation.worker import Order


class Schedule:
    """The episodes that are left, given out task by task."""

    def __init__(self, orders: Iterable[Order]) -> None:
        """Queues `orders`; within a task they are given out in order."""
        self._left: dict[str, deque[Order]] = {}
        for order in orders:
            self._left.setdefault(order.task, deque()).append(order)
        self._workers_on: Counter[str] = Counter()

    def __len__(self) -> int:
        """Episodes not given out yet."""
        return sum(len(orders) for orders in self._left.values())

    def next(self, task: str | None) -> Order | None:
        """The next episode for a worker whose simulator is built for `task` (None: not built).

        The same task while it lasts, then the one with most episodes per worker; None at the end.
        """
        if task is not None and self._left[task]:
            return self._left[task].popleft()
        if task is not None:
            self._workers_on[task] -= 1
        if not len(self):
            return None
        busiest = max(self._left, key=lambda t: len(self._left[t]) / (1 + self._workers_on[t]))
        self._workers_on[busiest] += 1
        return self._left[busiest].popleft()
