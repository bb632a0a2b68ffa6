"""What every request passes: the key before it, one line of the log and one count behind its last byte."""

from __future__ import annotations

import hmac
import json
import logging
import time
from typing import Any

from fastapi.responses import JSONResponse

from molora.serve.protocol import ApiError
from molora.serve.server import Server

log = logging.getLogger("molora.serve")


class Gate:
    """ASGI around an application. Who handles a request may set ``scope["outcome"]``, a status that became known only
    when the answer had begun."""

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, path, status = time.perf_counter(), scope["path"], 500

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            if path.startswith("/v1/") and not self._has_key(scope):
                error = ApiError(401, "a valid key is needed: Authorization: Bearer KEY", None, "invalid_api_key")
                await refusal(error)(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        finally:
            status = scope.get("outcome", status)
            # The route's path, not the client's: each label lives as long as the server.
            route = getattr(scope.get("route"), "path", "other")
            self.server.metrics.requests.labels(route, str(status)).inc()
            line = {"path": path[:200], "status": status, "seconds": round(time.perf_counter() - began, 4)}
            log.info(json.dumps(line | {"open": self.server.engine.open}))

    def _has_key(self, scope: Any) -> bool:
        if self.server.api_key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(key, self.server.api_key.encode())


def refusal(error: ApiError) -> JSONResponse:
    """An error as a response in OpenAI's form."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
    headers[500] = {"Connection": "close"}  # uvicorn closes it behind an exception; who is not told may use it again
    return JSONResponse(error.body, error.status, headers=headers.get(error.status))
