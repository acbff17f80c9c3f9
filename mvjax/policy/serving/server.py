"""The policy behind openpi's websocket protocol.

A client connects and is sent a map of what the policy is (`metadata`). Then every binary message is
an observation and is answered by a binary message with its actions, in turn; what cannot be
answered gets a text, one sentence, and the connection stays. GET /healthz says OK, GET /health
tells counts and latencies as JSON.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from mvjax.policy.serving.adapters.adapter import Adapter
from mvjax.policy.serving.batcher import Batcher, PolicyError
from mvjax.policy.serving.door import Door
from mvjax.policy.serving.latency import Latency
from mvjax.policy.serving.request import RequestError
from mvjax.policy.serving.sessions import Senses, Session
from mvjax.policy.serving.wire import WireError, WireLimits, decode, encode

LOG = logging.getLogger(__name__)
TRY_AGAIN_LATER = 1013  # of RFC 6455's registry


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
    wire: WireLimits = field(default_factory=WireLimits)
    send_timeout: float = 10.0
    ping: float = 20.0


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
        senses: Senses,
        make_batcher: Callable[[Callable[[], int]], Batcher],
        metadata: Mapping[str, Any],
    ) -> None:
        self._serving, self._adapter, self._senses = serving, adapter, senses
        self._latency = Latency()
        self._door = Door(serving.api_key, serving.max_clients, self._latency)
        self._batcher = make_batcher(lambda: self._door.clients)
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
            process_request=self._door.answer,
            logger=_quiet_logger(),
        )

    async def _attend(self, connection: ServerConnection) -> None:
        """One client, from its metadata to its end, whatever that is."""
        if self._door.full:  # several came through it together
            return await connection.close(TRY_AGAIN_LATER, self._door.refuse())
        self._door.clients += 1
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
            self._door.clients -= 1

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
        except (WireError, RequestError) as error:
            sentence = str(error)
        except PolicyError as error:
            LOG.error("A query failed", exc_info=error.__cause__)
            sentence = str(error)
        except Exception:
            LOG.exception("A query could not be answered")
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
    logger = logging.getLogger("mvjax.policy.websockets")
    logger.setLevel(logging.CRITICAL)
    return logger
