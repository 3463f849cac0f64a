"""HTTP connections: how many, and how long each may take over a request and over reading its reply."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from teacher_server.places import Places

_REFUSED_AT_ONCE = 100  # before other work of the event loop gets its turn


@dataclass(frozen=True)
class Patience:
    request_seconds: float = 10.0
    """For a request to arrive whole, from when the connection was made or the last reply sent."""
    reading_seconds: float = 5.0
    """In which a reader must take `reading_bytes` of its reply, or all that is left."""
    reading_bytes: int = 16 * 1024


class Listener(socket.socket):
    """A listening socket that takes so many connections, and of one address so many; beyond that it closes them.

    Counted from accept to close, so what is still in its TLS handshake counts too.
    """

    def __init__(self, listening: socket.socket, places: Places, dropped: Callable[[str], object]) -> None:
        """Takes over the `listening` socket. `dropped` is told why a connection was closed: "full" or "address"."""
        super().__init__(fileno=listening.detach())
        self._places, self._dropped = places, dropped

    def accept(self) -> tuple[socket.socket, Any]:
        for _ in range(_REFUSED_AT_ONCE):
            connection, address = super().accept()
            if not (lacking := self._places.take(address[0])):
                return _Accepted(connection, self._places, address[0]), address
            self._dropped(lacking)
            connection.close()
        raise BlockingIOError  # asyncio's word for: no more for now


class _Accepted(socket.socket):
    """Gives its place back when it is closed."""

    def __init__(self, connection: socket.socket, places: Places, address: str) -> None:
        super().__init__(fileno=connection.detach())
        self._places: Places | None = places
        self._address = address

    def close(self) -> None:
        places, self._places = self._places, None
        if places is not None:
            places.leave(self._address)
        super().close()


class Connection(H11Protocol):
    """uvicorn's, which waits for ever for a request's end and for a reader; this one does not."""

    def __init__(self, *, dropped: Callable[[str], object], patience: Patience, **uvicorns: Any) -> None:
        """`dropped` is told why a connection was cut: "slow_request" or "slow_reader"."""
        super().__init__(**uvicorns)
        self._dropped, self._patience = dropped, patience
        self._unsent, self._resumed = 0, False
        self._since = 0.0
        self._watching: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's does
        super().connection_made(transport)
        self._since = self.loop.time()
        self._watch_on()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watching is not None:
            self._watching.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def resume_writing(self) -> None:
        self._resumed = True
        super().resume_writing()

    def _watch_on(self) -> None:
        wait = min(self._patience.reading_seconds, self._patience.request_seconds)
        self._watching = self.loop.call_later(wait, self._watch)

    def _watch(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        reads = self._resumed or not self._unsent or self._unsent - unsent >= self._patience.reading_bytes
        whole = self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body)
        if unsent and not reads:
            self._cut("slow_reader")
        elif not whole and not unsent and self.loop.time() - self._since >= self._patience.request_seconds:
            self._cut("slow_request")
        else:
            self._unsent, self._resumed = unsent, False
            self._watch_on()

    def _cut(self, why: str) -> None:
        self._dropped(why)
        self.transport.abort()
