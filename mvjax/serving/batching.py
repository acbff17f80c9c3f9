"""Batches queries that arrive at about the same time.

The policy runs in a thread of its own while connections are read and written; queries that arrive
during a batch form the next one.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from mvjax.parallel import split_ways
from mvjax.policy.observation import Act, Observation
from mvjax.policy.policy import Policy


@dataclass(frozen=True)
class Batching:
    """How queries are batched.

    Attributes:
        sizes: batch sizes to compile; a batch is padded to the smallest that holds it.
        window: seconds that a query waits for others while fewer than all clients have asked.
    """

    sizes: Sequence[int] = (1, 8)
    window: float = 0.005

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"Batch sizes must be at least 1, got {list(self.sizes)}.")


class PolicyError(RuntimeError):
    """The policy failed at a query."""


@dataclass(frozen=True)
class Answer:
    """A chunk [horizon, action_dim], seconds of waiting and of computing, and the batch's size."""

    chunk: np.ndarray
    waited: float
    computed: float
    batch: int


@dataclass
class _Query:
    observation: Observation
    answer: asyncio.Future
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Answers queries in batches.

    Args:
        act: the policy.
        most: maximum number of queries per batch.
        window: seconds that a query waits for others.
        clients: returns the number of clients; a batch with a query of each does not wait.
    """

    def __init__(
        self, act: Act, most: int, window: float = 0.005, clients: Callable[[], int] = lambda: 2
    ) -> None:
        self._act, self._most, self._window, self._clients = act, most, window, clients
        self._waiting: deque[_Query] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "policy")

    async def run(self) -> None:
        """Serves until it is cancelled."""
        try:
            while True:
                batch = await self._collect()
                if batch:
                    await self._answer(batch)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def ask(self, observation: Observation) -> Answer:
        """Answers an observation; PolicyError if the policy fails. It may be cancelled."""
        query = _Query(observation, asyncio.get_running_loop().create_future())
        self._waiting.append(query)
        self._arrived.set()
        return await query.answer

    async def _collect(self) -> list[_Query]:
        """The next batch; empty if its clients have disconnected."""
        while not self._waiting:
            await self._arrival(None)
        deadline = self._waiting[0].arrived + self._window
        while len(self._waiting) < min(self._most, self._clients()):
            left = deadline - time.monotonic()
            if left <= 0 or not await self._arrival(left):
                break
        count = min(self._most, len(self._waiting))
        batch = [self._waiting.popleft() for _ in range(count)]
        return [query for query in batch if not query.answer.done()]

    async def _arrival(self, timeout: float | None) -> bool:
        self._arrived.clear()
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def _answer(self, batch: list[_Query]) -> None:
        began = time.monotonic()
        try:
            observations = [query.observation for query in batch]
            loop = asyncio.get_running_loop()
            chunks = await loop.run_in_executor(self._thread, self._act, observations)
        except Exception as error:
            if len(batch) > 1:  # one observation may have failed the others: answer each alone
                for query in batch:
                    if not query.answer.done():
                        await self._answer([query])
            elif not batch[0].answer.done():
                failure = PolicyError(f"The policy failed: {' '.join(str(error).split())[:300]}")
                failure.__cause__ = error
                batch[0].answer.set_exception(failure)
            return
        computed = time.monotonic() - began
        for query, chunk in zip(batch, chunks):
            if not query.answer.done():  # its client may have disconnected meanwhile
                answer = Answer(chunk, began - query.arrived, computed, len(batch))
                query.answer.set_result(answer)


def act_in_sizes(policy: Policy, sizes: Sequence[int]) -> Act:
    """Compiles `policy.act` for all batch sizes; queries use the smallest that holds them.

    The compiled policies share weights and text embeddings.
    """
    ways = split_ways("batch", policy.mesh, policy.rules)  # number of devices that share a batch
    sizes = sorted({-(-size // ways) * ways for size in sizes})
    variants = [replace(policy, batch_size=size) for size in sizes]
    for variant in variants:
        variant.warm_up()

    def act(observations: Sequence[Observation]) -> np.ndarray:
        fitting = (v for v in variants if v.batch_size >= len(observations))
        return next(fitting, variants[-1]).act(observations)

    return act
