"""What one HTTP connection may take of us: time for a request, and room among the others."""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

_MAX_CONNECTIONS = 512
_MAX_OF_A_PEER = 128  # of one address; many may be behind it


class BoundedConnection(H11Protocol):
    """Ends a connection that has not read its reply, or not even sent its request, after `REQUEST_SECONDS`.

    uvicorn waits for a peer's bytes for ever, and for it to read ours. What is idle between two requests it closes by
    itself (timeout_keep_alive).
    """

    REQUEST_SECONDS = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._end: asyncio.TimerHandle | None = None
        self._between_requests = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        others = [cast("H11Protocol", other).client for other in self.connections]
        of_peer = sum(1 for other in others if other and self.client and other[0] == self.client[0])
        if len(others) > _MAX_CONNECTIONS or of_peer > _MAX_OF_A_PEER:
            transport.abort()
        else:
            self._begin()

    def data_received(self, data: bytes) -> None:
        if self._between_requests:
            self._begin()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._between_requests = True  # until the next request's first byte the time goes on: ours may not be read yet
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def _begin(self) -> None:
        self._cancel()
        self._between_requests = False
        self._end = self.loop.call_later(self.REQUEST_SECONDS, self.transport.abort)

    def _cancel(self) -> None:
        if self._end is not None:
            self._end.cancel()
