"""The client of a policy server, for robots: needs only numpy, msgpack and websockets.

One query and its answer:

    with Client("ws://gpu-machine:8000") as policy:
        policy.reset()
        answer = policy.infer({"observation/image": image, "observation/state": state,
                               "prompt": "open the drawer"})
        answer["actions"]  # float32 [horizon, action_dim]
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from mvjax.serving.protocol import decode, encode

log = logging.getLogger(__name__)


class QueryRefused(RuntimeError):
    """The server cannot answer this message, for the given reason; the connection stays open."""


class ServerUnreachable(ConnectionError):
    """The server cannot be reached, refuses this client, or does not answer in time."""


class Client:
    """One connection to a policy server; not thread-safe.

    After a lost connection the next query reconnects and is sent again; the server's history of
    pictures then starts anew, unless the query holds its own.

    Args:
        uri: such as ws://localhost:8000.
        api_key: the server's key, if it has one.
        timeout: seconds to wait for an answer.
        patience: seconds to try to connect, for a server that is still loading.

    Attributes:
        metadata: the server's description of its policy (`observed_frames`, `fps`, ...).

    Raises:
        ServerUnreachable: there is no server after `patience` seconds, or it refuses.
        ValueError: `uri` is not an address.
    """

    def __init__(
        self, uri: str, *, api_key: str = "", timeout: float = 10.0, patience: float = 30.0
    ) -> None:
        self._uri = uri if "://" in uri else f"ws://{uri}"
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._timeout, self._patience = timeout, patience
        self._connection: ClientConnection | None = None
        self._open = ExitStack()  # websockets 17 closes a connection as a context manager
        self.metadata: dict[str, Any] = {}
        self._connect()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the answer: `actions` float32 [horizon, action_dim], and `server_timing`.

        What the server finds strange about the observations (`notices`) is logged, too.

        Raises:
            QueryRefused: the server cannot answer this observation.
            ServerUnreachable: the connection is lost, or there is no answer after `timeout`
                seconds; the next call reconnects.
        """
        message = encode(dict(observation))
        if self._connection is not None:
            try:
                return self._ask(message)
            except ConnectionClosed as error:
                self.close()
                if error.rcvd is not None and error.rcvd.code == 1009:
                    raise QueryRefused(
                        f"The message has {len(message)} bytes, far more than the server accepts."
                    ) from error
                log.warning("%s: connection lost (%s); reconnecting", self._uri, error)
        self._connect()
        try:
            return self._ask(message)
        except ConnectionClosed as error:
            self.close()
            raise ServerUnreachable(
                f"{self._uri}: connection lost twice in a row: {error}."
            ) from error

    def reset(self) -> None:
        """Begins a new episode: the server drops the pictures of this connection."""
        self.infer({"reset": True})

    def close(self) -> None:
        """Closes the connection; a later query reconnects."""
        self._connection = None
        self._open.close()

    def __enter__(self) -> "Client":
        """Returns the client, which the end of the `with` closes."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the connection."""
        self.close()

    def _ask(self, message: bytes) -> dict[str, Any]:
        self._connection.send(message)
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            reply = self._connection.recv(self._timeout)
        except TimeoutError:
            self.close()  # or a late answer would be taken for the next one
            raise ServerUnreachable(
                f"{self._uri} has not answered for {self._timeout:g} s."
            ) from None
        if isinstance(reply, str):
            raise QueryRefused(reply)
        answer = decode(reply)
        for notice in answer.get("notices", ()):  # once per connection
            log.warning("%s: %s", self._uri, notice)
        return answer

    def _connect(self) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                opening = connect(
                    self._uri,
                    compression=None,  # as the server's
                    max_size=None,
                    additional_headers=self._headers,
                    open_timeout=max(1.0, self._patience),
                    close_timeout=1,
                )
                self._connection = self._open.enter_context(opening)
                self.metadata = self._receive()
                return
            except InvalidURI as error:
                raise ValueError(
                    f"{self._uri} is not an address such as ws://localhost:8000."
                ) from error
            except InvalidStatus as error:
                body = (error.response.body or b"").decode("utf-8", "replace").strip()
                raise ServerUnreachable(
                    f"{self._uri} refuses ({error.response.status_code}): {body}"
                ) from error
            except (OSError, WebSocketException) as error:
                self.close()
                if time.monotonic() > deadline:
                    raise ServerUnreachable(
                        f"There is no policy server at {self._uri} ({error}); is `python -m "
                        "launch.serve` running there?"
                    ) from error
                time.sleep(0.2)


# Executing one chunk while the next is being computed.
#
# A robot that waits for every answer stands still for the policy's latency. Here the query runs in
# the background while the robot executes the chunk it has. The first actions of the answer belong
# to steps that have passed meanwhile and are skipped: a chunk must cover the steps between two
# queries plus those of one latency. A server whose chunks continue one another is told what is left
# of the chunk at hand, and how many steps of it will have passed when the answer is there.

Infer = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # such as Client.infer


RECENT = 10  # queries whose slowest is taken for the next one's latency


class Overlap:
    """Queries in the background.

    Args:
        infer: asks the policy; called from one other thread only.
        period: seconds of a control step, for a server whose metadata have a "chunking" other than
            "none": queries then say what is left of the chunk at hand ("pending/actions") and how
            many steps of it will have passed when the answer is there ("pending/delay"), which is
            the latency of the slowest of the recent queries. 0: queries are sent as they are.

    Attributes:
        latencies: seconds of every answered query.
        delays: the delay that each query said, in control steps.
        waited: seconds that the robot stood still because no chunk covered the present step.
    """

    def __init__(self, infer: Infer, period: float = 0.0) -> None:
        self._infer, self._period = infer, period
        self._thread = ThreadPoolExecutor(1, "query")
        self._asked: tuple[int, Future] | None = None
        self._start, self._chunk = 0, np.zeros((0, 0), np.float32)
        self.latencies: list[float] = []
        self.delays: list[int] = []
        self.waited = 0.0

    @property
    def asking(self) -> bool:
        """Whether a query is pending; there is one at a time."""
        return self._asked is not None

    def ask(self, step: int, observation: Mapping[str, Any]) -> None:
        """Sends a query for the actions from control step `step` on, where this was observed."""
        if self.asking:
            raise RuntimeError(f"The query of step {self._asked[0]} has not been answered yet.")
        message = {**observation, **(self._pending(step) if self._period else {})}
        self._asked = step, self._thread.submit(self._timed, message)

    def action(self, step: int) -> np.ndarray:
        """Returns the action [action_dim] of control step `step` from the latest chunk.

        Waits for the pending query only if that chunk does not cover the step.

        Raises:
            RuntimeError: nothing was asked, or chunks are too short for the policy's latency.
            Exception: what `infer` raised.
        """
        if self.asking and self._asked[1].done():
            self._take()
        if step >= self._start + len(self._chunk) and self.asking:
            self.wait()
        if not self._start <= step < self._start + len(self._chunk):
            raise RuntimeError(
                f"Step {step} has no action: the latest chunk holds {len(self._chunk)} from step "
                f"{self._start} on. Ask more often."
            )
        return self._chunk[step - self._start]

    def wait(self) -> None:
        """Waits for the pending query; raises what `infer` raised."""
        began = time.monotonic()
        self._take()
        self.waited += time.monotonic() - began

    def close(self) -> None:
        """Ends the background thread, after the pending query."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _pending(self, step: int) -> dict[str, Any]:
        left = self._chunk[max(0, step - self._start) :]
        if not len(left) or step < self._start:
            return {}  # the robot will wait for the answer
        # Rounded up: a step that has begun when the answer comes is still the old chunk's.
        delay = min(math.ceil(max(self.latencies[-RECENT:]) / self._period), len(left))
        self.delays.append(delay)
        return {"pending/actions": left, "pending/delay": delay}

    def _timed(self, observation: Mapping[str, Any]) -> np.ndarray:
        began = time.monotonic()
        actions = self._infer(observation)["actions"]
        self.latencies.append(time.monotonic() - began)
        return actions

    def _take(self) -> None:
        (self._start, answer), self._asked = self._asked, None
        self._chunk = answer.result()
