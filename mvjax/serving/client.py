"""Asking a policy server, from a robot: needs numpy, msgpack and websockets, nothing else.

with Client("ws://gpu-machine:8000") as policy:
    policy.reset()
    answer = policy.infer({"observation/image": image, "observation/state": state,
                           "prompt": "open the drawer"})
    answer["actions"]  # float32 [horizon, action_dim]
"""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from mvjax.serving.protocol import decode, encode

LOG = logging.getLogger(__name__)


class QueryRefused(RuntimeError):
    """The server cannot answer this message; its sentence says why. The connection stays."""


class ServerUnreachable(ConnectionError):
    """The server cannot be reached, turns this client away, or does not answer in time."""


class Client:
    """One connection to a policy server; not to be shared by threads.

    A connection that breaks is made again at the next query, and that query is sent again: the
    server's history of pictures then starts anew, unless the query holds its own.

    Args:
        uri: such as ws://localhost:8000.
        api_key: what the server was started with, if anything.
        timeout: seconds to wait for an answer.
        patience: seconds to try to connect, for a server that is still loading.

    Attributes:
        metadata: what the server says of its policy (`observed_frames`, `fps`, ...).

    Raises:
        ServerUnreachable: there is no server after `patience` seconds, or it refuses.
        ValueError: `uri` is no address.
    """

    def __init__(
        self, uri: str, *, api_key: str = "", timeout: float = 10.0, patience: float = 30.0
    ) -> None:
        self._uri = uri if "://" in uri else f"ws://{uri}"
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._timeout, self._patience = timeout, patience
        self._connection: ClientConnection | None = None
        self._open = ExitStack()  # connections of websockets 17 are context managers
        self.metadata: dict[str, Any] = {}
        self._connect()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer: `actions` float32 [horizon, action_dim], and `server_timing`.

        Raises:
            QueryRefused: the server cannot answer this observation.
            ServerUnreachable: it is gone, or silent for `timeout` seconds; the next call connects
                again.
        """
        message = encode(dict(observation))
        if self._connection is not None:
            try:
                return self._ask(message)
            except ConnectionClosed as error:
                self.close()
                if error.rcvd is not None and error.rcvd.code == 1009:
                    raise QueryRefused(
                        f"The message has {len(message)} bytes, far more than the server takes."
                    ) from error
                LOG.warning("%s was lost (%s); connecting again", self._uri, error)
        self._connect()
        try:
            return self._ask(message)
        except ConnectionClosed as error:
            self.close()
            raise ServerUnreachable(f"{self._uri} was lost twice in a row: {error}.") from error

    def reset(self) -> None:
        """Begins a new episode: the server forgets the pictures of this connection."""
        self.infer({"reset": True})

    def close(self) -> None:
        """Says goodbye; a later query connects again."""
        self._connection = None
        self._open.close()

    def __enter__(self) -> "Client":
        """The client itself, closed at the end of the `with`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the connection."""
        self.close()

    def _ask(self, message: bytes) -> dict[str, Any]:
        self._connection.send(message)
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            reply = self._connection.recv(self._timeout)
        except TimeoutError:
            self.close()  # an answer that comes late must not be taken for the next one
            raise ServerUnreachable(
                f"{self._uri} has not answered for {self._timeout:g} s."
            ) from None
        if isinstance(reply, str):
            raise QueryRefused(reply)
        return decode(reply)

    def _connect(self) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                opening = connect(
                    self._uri,
                    compression=None,
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
                    f"{self._uri} is no address of a server, such as ws://localhost:8000."
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


# Acting on one chunk while the next is being computed.
#
# A robot that waits for every answer stands still for the policy's latency at every query. Here
# the question is asked in the background and the robot goes on with the chunk it has. The
# answer's first actions belong to steps that have passed meanwhile and are skipped, so a chunk
# must reach over the steps between two queries and those of one latency.


Infer = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # such as Client.infer


class Overlap:
    """Chunks of actions, asked for in the background.

    Args:
        infer: asks the policy; called from one other thread only.

    Attributes:
        latencies: seconds of every query that has been answered.
        waited: seconds that the robot stood still because no chunk reached to the present step.
    """

    def __init__(self, infer: Infer) -> None:
        self._infer = infer
        self._thread = ThreadPoolExecutor(1, "query")
        self._asked: tuple[int, Future] | None = None
        self._start, self._chunk = 0, np.zeros((0, 0), np.float32)
        self.latencies: list[float] = []
        self.waited = 0.0

    @property
    def asking(self) -> bool:
        """Whether an answer is still to come; only one question is asked at a time."""
        return self._asked is not None

    def ask(self, step: int, observation: Mapping[str, Any]) -> None:
        """Asks what to do from control step `step` on, where this was observed.

        Raises:
            RuntimeError: the answer to another question is still to come.
        """
        if self.asking:
            raise RuntimeError(f"The query of step {self._asked[0]} has not been answered yet.")
        self._asked = step, self._thread.submit(self._timed, dict(observation))

    def action(self, step: int) -> np.ndarray:
        """The action [action_dim] of control step `step`, from the newest chunk there is.

        Waits only if no chunk that has come reaches to this step.

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
                f"Step {step} has no action: the newest chunk holds {len(self._chunk)} from step "
                f"{self._start} on. Ask more often."
            )
        return self._chunk[step - self._start]

    def wait(self) -> None:
        """Stands still until the answer to the open question has come.

        Raises:
            Exception: what `infer` raised.
        """
        began = time.monotonic()
        self._take()
        self.waited += time.monotonic() - began

    def close(self) -> None:
        """Ends the background thread, after the open question."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _timed(self, observation: Mapping[str, Any]) -> np.ndarray:
        began = time.monotonic()
        actions = self._infer(observation)["actions"]
        self.latencies.append(time.monotonic() - began)
        return actions

    def _take(self) -> None:
        (self._start, answer), self._asked = self._asked, None
        self._chunk = answer.result()
