"""Asking a policy server, from a robot: needs numpy, msgpack and websockets, nothing else.

with PolicyClient("ws://gpu-machine:8000") as policy:
    policy.reset()
    answer = policy.infer({"observation/image": image, "observation/state": state,
                           "prompt": "open the drawer"})
    answer["actions"]  # float32 [horizon, action_dim]
"""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from mvjax.policy.serving.wire import decode, encode

LOG = logging.getLogger(__name__)


class QueryRefused(RuntimeError):
    """The server cannot answer this message; its sentence says why. The connection stays."""


class ServerUnreachable(ConnectionError):
    """The server cannot be reached, turns this client away, or does not answer in time."""


class PolicyClient:
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

    def __enter__(self) -> "PolicyClient":
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
