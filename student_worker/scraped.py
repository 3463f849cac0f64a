"""A page that Prometheus scrapes, where it is, and the wait for Prometheus to come once more."""

import errno
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from socketserver import ThreadingTCPServer
from time import monotonic
from types import TracebackType
from typing import Any, Self

_PATH = "/metrics"
_SLOWEST_PEER = 10.0
_POLL = 0.1  # as long as the server may take to end
_SCRAPES = 5  # remembered: of two Prometheuses that scrape one page, two scrapes in a row tell no interval
_LONGEST_WAIT = 60.0
_WAIT_AFTER_ONE = 15.0  # the interval of deploy/prometheus; of whoever came once, none is known


class Page:
    """`with Page(host, port, content, kind) as page`: serves what `content()` gives, of that type, at page.url.

    `port` 0 takes a free one. There is no authentication. Raises OSError where the port is taken.
    """

    def __init__(self, host: str, port: int, content: Callable[[], bytes], kind: str) -> None:
        self._host, self._port = host, port
        self._content, self._kind = content, kind
        self._scrapes: deque[float] = deque(maxlen=_SCRAPES)  # when each began
        self._answered = 0.0  # when that one began which had its answer and began last
        self._came = threading.Condition()
        self.address = ""
        """host:port."""

    def __enter__(self) -> Self:
        self._server = server = self._opened()
        name = f"[{self._host}]" if ":" in self._host else self._host
        self.address = f"{name}:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(_POLL,), name="metrics", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://{self.address}{_PATH}"

    def patience(self) -> float:
        """For how many seconds another scrape is worth waiting for; 0 where none ever came.

        Twice the interval, from the last one on: so nobody waits for a Prometheus that does not come any more.
        """
        with self._came:
            scrapes = sorted(self._scrapes)
        if not scrapes:
            return 0.0
        if len(scrapes) == 1:
            return _WAIT_AFTER_ONE
        interval = max(later - earlier for earlier, later in pairwise(scrapes))
        return min(max(0.0, scrapes[-1] + 2 * interval - monotonic()), _LONGEST_WAIT)

    def wait(self, since: float, seconds: float) -> bool:
        """Whether a scrape that began after `since`, a time.monotonic(), had its answer within so many seconds from
        now on; returns as soon as one has."""
        with self._came:
            return self._came.wait_for(lambda: self._answered >= since, seconds)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        began = monotonic()
        if found := request.path.partition("?")[0] == _PATH:
            with self._came:
                self._scrapes.append(began)
        content = self._content() if found else f"only {_PATH} is here\n".encode()
        request.send_response(200 if found else 404)
        request.send_header("Content-Type", self._kind if found else "text/plain")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)
        if found:
            with self._came:
                self._answered = max(self._answered, began)
                self._came.notify_all()

    def _opened(self) -> ThreadingTCPServer:
        page = self

        class Handler(BaseHTTPRequestHandler):
            timeout = _SLOWEST_PEER

            def do_GET(self) -> None:
                page.answer(self)

            def log_message(self, *_: Any) -> None:
                """Nobody asks who came."""

        class Server(ThreadingTCPServer):
            address_family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            allow_reuse_address = True  # a run may follow another at once, on the same port
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exception(), OSError):  # else the peer has gone
                    super().handle_error(request, client_address)

        try:
            return Server((self._host, self._port), Handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise OSError(
                f"metrics_port: {self._port} of {self._host} is taken; give another --metrics-port, or 0 for a free one"
            ) from error


def local_host(addresses: Sequence[str]) -> str:
    """This machine's address from which the first of these host:port that has a route is reached; loopback for none.

    Nothing is sent. Raises OSError where no address has one.
    """
    failed: OSError | None = None
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            places = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
        except OSError as error:
            failed = error
            continue
        # IPv4 first: whoever has the teacher at localhost looks for our page at 127.0.0.1.
        for family, kind, _, _, place in sorted(places, key=lambda one: one[0] != socket.AF_INET):
            try:
                with socket.socket(family, kind) as probe:
                    probe.connect(place)
                    found: str = probe.getsockname()[0]
                    return found
            except OSError as error:
                failed = error
    if failed is None:
        return "127.0.0.1"
    raise OSError(
        f"metrics_port: no way from here to {', '.join(addresses)}, so it is not known on which address to serve "
        f"({failed})"
    ) from failed
