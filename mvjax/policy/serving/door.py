"""Who is let in to a policy server, and what anybody may know of it."""

import hmac
import json
from http import HTTPStatus

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from mvjax.policy.serving.latency import Latency


class Door:
    """Answers health checks and turns clients away, before a connection is a websocket.

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
