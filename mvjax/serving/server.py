"""Serves a policy in openpi's websocket protocol.

A client that connects receives a map that describes the policy (`metadata`). Then every binary
message is an observation, answered in turn by a binary message with its actions. A message that
cannot be answered gets a text message with the reason, and the connection stays open. What may be
wrong with an observation is said once per connection, in `notices` of the reply and in the log. GET
/healthz answers OK, GET /health counts and latencies as JSON.
"""

import asyncio
import hmac
import itertools
import json
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from data_pipelines.cameras import View
from mvjax.identity import digest_of
from mvjax.policy.policy import Policy
from mvjax.policy.robot import check_gripper, described, labels, trained_robot
from mvjax.serving.batching import Batcher, Batching, PolicyError, act_in_sizes
from mvjax.serving.conversions import Adapter
from mvjax.serving.messages import RequestError
from mvjax.serving.notices import Notices, Ranges, Totals, trained_pictures
from mvjax.serving.protocol import MESSAGE_BYTES, ProtocolError, decode, encode
from mvjax.serving.session import Session, SessionSpec, history_keys

log = logging.getLogger(__name__)

TRY_AGAIN_LATER = 1013  # websocket close code, registered for RFC 6455
RECENT = 1000  # queries from which percentiles are computed


@dataclass(frozen=True)
class Serving:
    """Address and limits of a server.

    Attributes:
        host, port: address; port 0 selects a free one.
        max_clients: maximum number of connections.
        api_key: the key that clients must send (`Authorization: Api-Key ...`); "" for none.
        message_bytes: maximum size of a message. One up to twice as large is answered with an
            error, a larger one closes its connection before it is read.
        send_timeout: seconds that a client may take to receive an answer.
        ping: seconds between pings, which detect vanished clients, and that a reply may take.
    """

    host: str = "0.0.0.0"
    port: int = 8000
    max_clients: int = 64
    api_key: str = ""
    message_bytes: int = MESSAGE_BYTES
    send_timeout: float = 10.0
    ping: float = 20.0


class Metrics:
    """Counts of queries, errors, refused connections and vanished clients; notices; latencies."""

    def __init__(self) -> None:
        self.notices: Totals = {}
        self.counts = Counter(queries=0, errors=0, refused=0, vanished=0)
        self._began = time.monotonic()
        self._parts: dict[str, deque[float]] = defaultdict(partial(deque, maxlen=RECENT))

    def add(self, **seconds: float) -> None:
        """Adds a query with its seconds by part."""
        self.counts["queries"] += 1
        for part, value in seconds.items():
            self._parts[part].append(value)

    def report(self) -> dict:
        """Returns counts, seconds since the start, and percentiles of recent queries in ms."""
        return {
            **self.counts,
            "notices": self.notices,
            "up_s": round(time.monotonic() - self._began, 1),
            "latency_ms": {
                part: {
                    f"p{p}": round(1e3 * float(np.percentile(seconds, p)), 2) for p in (50, 95, 99)
                }
                for part, seconds in self._parts.items()
            },
        }


class PolicyServer:
    """Answers the clients of one policy.

    Args:
        serving: address and limits.
        adapter: the kind of client.
        spec: the policy's input.
        make_batcher: makes the policy's batcher from a function that counts the clients.
        metadata: sent to every client that connects.
        identity: what the policy is (`Policy.identity`), shown in /health.
    """

    def __init__(
        self,
        serving: Serving,
        adapter: Adapter,
        spec: SessionSpec,
        make_batcher: Callable[[Callable[[], int]], Batcher],
        metadata: Mapping[str, Any],
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self._serving, self._adapter, self._spec = serving, adapter, spec
        self._clients, self._metrics, self._episodes = 0, Metrics(), itertools.count()
        self._batcher = make_batcher(lambda: self._clients)
        self._metadata, self._identity = encode(metadata), dict(identity or {})

    async def run(self, ready: Callable[[str, int], None] = lambda host, port: None) -> None:
        """Serves until it is cancelled; calls `ready(host, port)` once clients can connect."""
        serving = self._serving
        # websockets logs a traceback for every failed handshake, most of them of port scanners.
        quiet = logging.getLogger("mvjax.serving.websockets")
        quiet.setLevel(logging.CRITICAL)
        listening = serve(
            self._attend,
            serving.host,
            serving.port,
            compression=None,  # deflating pictures costs milliseconds and gains little
            max_size=2 * serving.message_bytes,
            max_queue=1,  # unread messages wait in the client's socket, not in this memory
            ping_interval=serving.ping,
            ping_timeout=serving.ping,
            close_timeout=min(serving.ping, 2.0),
            process_request=self._answer_request,
            logger=quiet,
        )
        async with listening as server, asyncio.TaskGroup() as tasks:
            ready(*server.sockets[0].getsockname()[:2])
            tasks.create_task(self._batcher.run())
            await server.serve_forever()

    def _answer_request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers an HTTP request; None accepts it as a websocket."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if path == "/health":
            report = {"status": "ok", "clients": self._clients, **self._metrics.report()}
            report["policy"] = self._identity
            response = connection.respond(HTTPStatus.OK, json.dumps(report) + "\n")
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "application/json"
            return response
        expected = f"Api-Key {self._serving.api_key}".encode()
        sent = ",".join(request.headers.get_all("Authorization"))
        sent = sent.encode("utf-8", "surrogateescape")
        if self._serving.api_key and not hmac.compare_digest(sent, expected):
            self._metrics.counts["refused"] += 1
            reason = "This server needs the header Authorization: Api-Key ...\n"
            return connection.respond(HTTPStatus.UNAUTHORIZED, reason)
        if reason := self._refusal():
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, reason + "\n")
        return None

    def _refusal(self) -> str:
        """The reason to refuse another client, which is counted; "" if there is room."""
        if self._clients < self._serving.max_clients:
            return ""
        self._metrics.counts["refused"] += 1
        return f"The server has its {self._clients} clients already; try again later."

    async def _attend(self, connection: ServerConnection) -> None:
        """Serves one client until it disconnects."""
        if reason := self._refusal():  # several handshakes were accepted at the same time
            return await connection.close(TRY_AGAIN_LATER, reason)
        self._clients += 1
        client = ":".join(map(str, connection.remote_address[:2]))
        notices = Notices(self._metrics.notices, client)
        session = Session(self._adapter, self._spec, self._episodes, notices)
        try:
            await self._send(connection, self._metadata)
            async for message in connection:
                await self._send(connection, await self._reply(connection, session, message))
        except ConnectionClosed:
            self._metrics.counts["vanished"] += 1
        except TimeoutError:
            self._metrics.counts["vanished"] += 1
            connection.transport.abort()  # a close frame would wait behind the unsent answer
        finally:
            self._clients -= 1

    async def _send(self, connection: ServerConnection, reply: bytes | str) -> None:
        await asyncio.wait_for(connection.send(reply), self._serving.send_timeout)

    async def _reply(
        self, connection: ServerConnection, session: Session, message: bytes | str
    ) -> bytes | str:
        """The actions, or an error message."""
        try:
            answer = asyncio.ensure_future(self._infer(session, message))
            return await _unless_closed(connection, answer)
        except ConnectionClosed:
            raise
        except (ProtocolError, RequestError) as error:
            reason = str(error)
        except PolicyError as error:
            log.error("A query failed", exc_info=error.__cause__)
            reason = str(error)
        except Exception:
            log.exception("A query failed")
            reason = "The server failed at this query; its log says why."
        self._metrics.counts["errors"] += 1
        return reason

    async def _infer(self, session: Session, message: bytes | str) -> bytes:
        began = time.monotonic()
        if isinstance(message, str):
            raise RequestError("Text was sent; observations are binary messages of msgpack.")
        request = decode(message, self._serving.message_bytes)
        if not isinstance(request, dict):
            raise RequestError(f"An observation is a map, not {type(request).__name__}.")
        reset = request.get("reset", False)
        if not isinstance(reset, bool):
            raise RequestError("'reset' must be true or false.")
        if reset:
            session.reset()
            if len(request) == 1:
                return encode({"reset": True})
        seen = session.observe(request)
        read = time.monotonic() - began
        answer = await self._batcher.ask(seen.observation)
        reply: dict[str, Any] = {
            "actions": session.actions(answer.chunk, seen),
            "server_timing": {
                "infer_ms": answer.computed * 1e3,
                "wait_ms": answer.waited * 1e3,
                "batch": answer.batch,
            },
        }
        if notices := session.notices.take():
            reply["notices"] = notices
        total = time.monotonic() - began
        self._metrics.add(read=read, wait=answer.waited, infer=answer.computed, total=total)
        return encode(reply)


async def _unless_closed(connection: ServerConnection, answer: asyncio.Future) -> bytes:
    """Waits for the answer; cancels the query if the connection closes first."""
    closed = asyncio.ensure_future(connection.wait_closed())
    try:
        await asyncio.wait({answer, closed}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ConnectionClosed(None, None)
    finally:
        closed.cancel()
        answer.cancel()


def make_server(
    policy: Policy,
    config: Any,
    adapter: Adapter,
    serving: Serving,
    *,
    batching: Batching | None = None,
    prompt: str = "",
    camera_sizes: Mapping[str, tuple[int, int]] | None = None,
) -> PolicyServer:
    """Compiles a policy for every batch size, and makes its server.

    Args:
        policy, config, adapter, serving, batching: what is served, and how.
        prompt: the instruction for clients that send none.
        camera_sizes: camera -> height and width of its training pictures; of others: see
            `trained_pictures`.

    Raises:
        ValueError: the policy does not fit the client.
    """
    sizes, clip, io = policy.model.decoder.config, policy.model.clip, config.policy_io
    robot, what = trained_robot(config), policy.identity.get("what", {})
    views = robot.views or policy.views
    names = labels(robot.proprio, robot.proprio_dim), labels(robot.action, robot.action_dim)
    learned = Ranges.of(policy.normalizer, "actions", names[1])
    if (number := adapter.signed_gripper) is not None and learned is not None:
        who = f"--client={adapter.name}"
        check_gripper(np.min(learned.low[..., number]), learned.labels[number], who)
    chunking = policy.model.sampling.chunking
    if chunking != "none" and adapter.pending is None:
        raise ValueError(
            f"sampler.chunking is {chunking!r}, but clients of --client={adapter.name} do not say "
            "what they still have to execute, or their actions are relative to an earlier state: "
            "use --config.sampler.chunking=none, or --client=dataset."
        )
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
        "action_shift": io.action.get("shift", 0.0),
        "embodiment": robot.embodiment,
        "cameras": described_cameras(adapter, views),
        "state": described(robot.proprio),
        "actions": described(robot.action),
        "identity": digest_of(what) if what else "",
    }
    if chunking != "none":
        metadata["chunking"] = chunking
    if len(adapter.images) == 1:
        metadata["camera"] = next(iter(adapter.images))
    if adapter.execute > sizes.action_horizon:
        log.warning(
            "openpi's %s client executes %d actions of a chunk, but this policy's chunks have %d: "
            "set the client's number to at most that.",
            *(adapter.name, adapter.execute, sizes.action_horizon),
        )
    if adapter.control_hz and clip.observed_frames > 1:
        log.info(
            "the policy expects a history of %g pictures per second, one from each query of a "
            "connection: at %g actions per second, ask every %g actions.",
            *(clip.fps, adapter.control_hz, adapter.control_hz / clip.fps),
        )
    batcher = partial(Batcher, act, max(batching.sizes), batching.window)
    spec = SessionSpec(
        clip.observed_frames,
        sizes.proprio_horizon,
        prompt,
        cameras=trained_pictures(views, camera_sizes or {}),
        fps=clip.fps,
        proprio_fps=io.proprio.fps,
        proprio=Ranges.of(policy.normalizer, "proprio", names[0]),
        actions=learned,
        chunking=chunking,
        action_size=sizes.action_dim,
        longest_delay=policy.model.prefix if chunking == "prefix" else sizes.action_horizon,
    )
    return PolicyServer(serving, adapter, spec, batcher, metadata, what)


def described_cameras(adapter: Adapter, views: Sequence[View]) -> dict[str, dict[str, Any]]:
    """What metadata tells clients of each camera of a policy.

    Returns:
        camera -> the `key` of its picture and that of its `history` (nested keys are joined by
        "/"), and the `view` that shows it, with its `height` and `width`.
    """
    described, histories = {}, history_keys(adapter)
    for camera, keys in adapter.images.items():
        view = next(view for view in views if camera in view.cameras or not view.rows)
        described[camera] = {
            "key": "/".join(keys),
            "history": "/".join(histories[camera]),
            "view": view.name,
            "height": view.height,
            "width": view.width,
        }
    return described
