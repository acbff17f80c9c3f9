"""The policy behind openpi's websocket protocol.

A client connects and is sent a map of what the policy is (`metadata`). Then every binary message is
an observation and is answered by a binary message with its actions, in turn; what cannot be
answered gets a text, one sentence, and the connection stays. GET /healthz says OK, GET /health
tells counts and latencies as JSON.
"""

import asyncio
import hmac
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from mvjax.policy.policy import Policy
from mvjax.serving.adapters import Adapter
from mvjax.serving.batching import Batcher, Batching, PolicyError, act_in_sizes
from mvjax.serving.protocol import MessageLimits, ProtocolError, decode, encode
from mvjax.serving.session import RequestError, Session, SessionSpec

log = logging.getLogger(__name__)

TRY_AGAIN_LATER = 1013  # of RFC 6455's registry
RECENT = 1000  # queries that the percentiles are of
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Serving:
    """Where and for whom a server is.

    Attributes:
        host, port: address; port 0 takes a free one.
        max_clients: connections at the same time.
        api_key: what clients must show (`Authorization: Api-Key ...`); "" for none.
        wire: limits of a message. One up to twice as large is refused with a sentence, a larger one
            closes its connection before it is read.
        send_timeout: seconds that a client may take to receive an answer.
        ping: seconds between the pings that find vanished clients, and that a client has to reply.
    """

    host: str = "0.0.0.0"
    port: int = 8000
    max_clients: int = 64
    api_key: str = ""
    wire: MessageLimits = field(default_factory=MessageLimits)
    send_timeout: float = 10.0
    ping: float = 20.0


class Latency:
    """What a server has done since it started.

    Attributes:
        counts: of queries, errors, refused connections and vanished clients.
    """

    def __init__(self) -> None:
        self.counts = Counter(queries=0, errors=0, refused=0, vanished=0)
        self._began = time.monotonic()
        self._parts: dict[str, deque[float]] = {}

    def add(self, **seconds: float) -> None:
        """Notes one query's seconds by part."""
        self.counts["queries"] += 1
        for part, value in seconds.items():
            self._parts.setdefault(part, deque(maxlen=RECENT)).append(value)

    def report(self) -> dict:
        """The counts, seconds since the start, and per part percentiles of recent queries in ms."""
        return {
            **self.counts,
            "up_s": round(time.monotonic() - self._began, 1),
            "latency_ms": {part: _percentiles(values) for part, values in self._parts.items()},
        }


def _percentiles(seconds: Iterable[float]) -> dict[str, float]:
    values = np.percentile(np.fromiter(seconds, float) * 1e3, PERCENTILES)
    return {f"p{p}": round(float(value), 2) for p, value in zip(PERCENTILES, values)}


class Gate:
    """Authentication, the limit of clients and health checks, before a connection is a websocket.

    Args:
        api_key: what clients must show (`Authorization: Api-Key ...`); "" for none.
        max_clients: how many may be in.
        latency: counts those who were refused, and makes the report.

    Attributes:
        clients: how many are in.
    """

    def __init__(self, api_key: str, max_clients: int, latency: Latency) -> None:
        self._api_key, self._max_clients, self._latency = api_key, max_clients, latency
        self.clients = 0

    @property
    def full(self) -> bool:
        """Whether nobody else can come in."""
        return self.clients >= self._max_clients

    def refuse(self) -> str:
        """Notes that a client was refused; why, if it was for want of room."""
        self._latency.counts["refused"] += 1
        return f"The server has its {self._max_clients} clients already; try again later."

    def answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """What a request is told; None lets it in."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if path == "/health":
            return self._health(connection)
        if not self._knows(request):
            self.refuse()
            return connection.respond(
                HTTPStatus.UNAUTHORIZED, "This server needs the header Authorization: Api-Key ...\n"
            )
        if self.full:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, self.refuse() + "\n")
        return None

    def _knows(self, request: Request) -> bool:
        if not self._api_key:
            return True
        wanted = f"Api-Key {self._api_key}".encode()
        shown = ",".join(request.headers.get_all("Authorization"))
        return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), wanted)

    def _health(self, connection: ServerConnection) -> Response:
        report = {"status": "ok", "clients": self.clients, **self._latency.report()}
        response = connection.respond(HTTPStatus.OK, json.dumps(report) + "\n")
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        return response


class PolicyServer:
    """Answers the clients of one policy.

    Args:
        serving: address and limits.
        adapter: the kind of client.
        senses: what the policy takes in.
        make_batcher: the policy behind a batcher, given a function that counts the clients.
        metadata: sent to every client that connects.
    """

    def __init__(
        self,
        serving: Serving,
        adapter: Adapter,
        senses: SessionSpec,
        make_batcher: Callable[[Callable[[], int]], Batcher],
        metadata: Mapping[str, Any],
    ) -> None:
        self._serving, self._adapter, self._senses = serving, adapter, senses
        self._latency = Latency()
        self._gate = Gate(serving.api_key, serving.max_clients, self._latency)
        self._batcher = make_batcher(lambda: self._gate.clients)
        self._metadata = encode(metadata)

    async def run(self, ready: Callable[[str, int], None] = lambda host, port: None) -> None:
        """Serves until it is cancelled.

        Args:
            ready: called with host and port as soon as clients can connect.

        Raises:
            OSError: the address is taken or not this machine's.
        """
        async with self._listen() as server, asyncio.TaskGroup() as tasks:
            ready(*server.sockets[0].getsockname()[:2])
            tasks.create_task(self._batcher.run())
            await server.serve_forever()

    def _listen(self) -> Server:
        serving = self._serving
        return serve(
            self._attend,
            serving.host,
            serving.port,
            compression=None,
            max_size=2 * serving.wire.message_bytes,
            max_queue=1,
            ping_interval=serving.ping,
            ping_timeout=serving.ping,
            close_timeout=min(serving.ping, 2.0),
            process_request=self._gate.answer,
            logger=_quiet_logger(),
        )

    async def _attend(self, connection: ServerConnection) -> None:
        """One client, from its metadata to its end, whatever that is."""
        if self._gate.full:  # several passed it together
            return await connection.close(TRY_AGAIN_LATER, self._gate.refuse())
        self._gate.clients += 1
        session = Session(self._adapter, self._senses)
        try:
            await self._send(connection, self._metadata)
            async for message in connection:
                await self._send(connection, await self._reply(connection, session, message))
        except ConnectionClosed:
            self._latency.counts["vanished"] += 1
        except TimeoutError:
            self._latency.counts["vanished"] += 1
            connection.transport.abort()  # a close frame would wait behind the answer
        finally:
            self._gate.clients -= 1

    async def _send(self, connection: ServerConnection, reply: bytes | str) -> None:
        await asyncio.wait_for(connection.send(reply), self._serving.send_timeout)

    async def _reply(
        self, connection: ServerConnection, session: Session, message: bytes | str
    ) -> bytes | str:
        """Actions, or one sentence."""
        try:
            answer = asyncio.ensure_future(self._infer(session, message))
            return await _unless_closed(connection, answer)
        except ConnectionClosed:
            raise
        except (ProtocolError, RequestError) as error:
            sentence = str(error)
        except PolicyError as error:
            log.error("A query failed", exc_info=error.__cause__)
            sentence = str(error)
        except Exception:
            log.exception("A query could not be answered")
            sentence = "The server failed at this query; its log says why."
        self._latency.counts["errors"] += 1
        return sentence

    async def _infer(self, session: Session, message: bytes | str) -> bytes:
        began = time.monotonic()
        if isinstance(message, str):
            raise RequestError("Text was sent; observations are binary messages of msgpack.")
        request = decode(message, self._serving.wire)
        if not isinstance(request, dict):
            raise RequestError(f"An observation is a map, not {type(request).__name__}.")
        if _wants_reset(request):
            session.reset()
            if len(request) == 1:
                return encode({"reset": True})
        seen = session.observe(request)
        read = time.monotonic() - began
        answer = await self._batcher.ask(seen.observation)
        reply = {
            "actions": session.actions(answer.chunk, seen),
            "server_timing": {
                "infer_ms": answer.computed * 1e3,
                "wait_ms": answer.waited * 1e3,
                "batch": answer.batch,
            },
        }
        total = time.monotonic() - began
        self._latency.add(read=read, wait=answer.waited, infer=answer.computed, total=total)
        return encode(reply)


async def _unless_closed(connection: ServerConnection, answer: asyncio.Future) -> bytes:
    """The answer; as soon as the connection has closed, the query is dropped."""
    closed = asyncio.ensure_future(connection.wait_closed())
    try:
        await asyncio.wait({answer, closed}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ConnectionClosed(None, None)
    finally:
        closed.cancel()
        answer.cancel()


def _wants_reset(request: dict) -> bool:
    reset = request.get("reset", False)
    if not isinstance(reset, bool):
        raise RequestError("'reset' must be true or false.")
    return reset


def _quiet_logger() -> logging.Logger:
    """Of handshakes that fail, scanners mostly, the library tells with a traceback each."""
    logger = logging.getLogger("mvjax.serving.websockets")
    logger.setLevel(logging.CRITICAL)
    return logger


def make_server(
    policy: Policy,
    config: Any,
    adapter: Adapter,
    serving: Serving,
    *,
    batching: Batching | None = None,
    prompt: str = "",
) -> PolicyServer:
    """Compiles the policy for every batch size, and puts it behind a server.

    Args:
        policy: a trained one.
        config: the stage-2 configuration it was trained with.
        adapter: the kind of client.
        serving: address and limits.
        batching: how queries are put together.
        prompt: the instruction of clients that send none.
    """
    sizes, clip, io = policy.model.decoder.config, policy.model.clip, config.policy_io
    batching = batching or Batching()
    act = act_in_sizes(policy, batching.sizes)
    metadata = {
        "model": "mimic-video",
        "client": adapter.name,
        "observed_frames": clip.observed_frames,
        "fps": clip.fps,
        "height": clip.height,
        "width": clip.width,
        "proprio_horizon": sizes.proprio_horizon,
        "proprio_fps": io.proprio.fps,
        "state_size": adapter.state_size,
        "action_horizon": sizes.action_horizon,
        "action_fps": io.action.fps,
    }
    batcher = partial(Batcher, act, max(batching.sizes), batching.window)
    senses = SessionSpec(clip.observed_frames, sizes.proprio_horizon, prompt)
    return PolicyServer(serving, adapter, senses, batcher, metadata)
