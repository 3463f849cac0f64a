"""The HTTP side: probes, metrics, the teacher; spend and budgets (http_accounts.py), usage (http_usage.py), pages."""

import asyncio
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from google.protobuf import json_format
from google.rpc import code_pb2
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as StarletteMessage

from protos import teacher_pb2 as pb
from teacher_server.access import LoggedRequests
from teacher_server.accounts import Books
from teacher_server.auth import Authenticator, Identity
from teacher_server.config import NetworkConfig
from teacher_server.errors import InvalidQuery, LedgerUnavailable, TeacherServerError
from teacher_server.http_accounts import routes
from teacher_server.http_connections import Connection, Listener, Patience
from teacher_server.http_guard import Guard
from teacher_server.http_page import add_pages
from teacher_server.http_usage import usage_routes
from teacher_server.metrics import CONTENT_TYPE, Metrics
from teacher_server.places import Places
from teacher_server.service import Service
from teacher_server.store import StoreUnavailable
from teacher_server.tls import Certificates

_STATUS = {
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.FAILED_PRECONDITION: 400,
    code_pb2.UNAUTHENTICATED: 401,
    code_pb2.PERMISSION_DENIED: 403,
    code_pb2.NOT_FOUND: 404,
    code_pb2.RESOURCE_EXHAUSTED: 429,
    code_pb2.UNIMPLEMENTED: 501,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DEADLINE_EXCEEDED: 504,
}
"""HTTP's status for google.rpc.Code, as google.api maps them; 500 for the rest."""

_MAX_BODY_BYTES = 64 * 1024
_MAX_HEADER_BYTES = 16 * 1024
_HANDSHAKE_SECONDS = 10.0


def http_app(service: Service, authenticator: Authenticator, metrics: Metrics, books: Books) -> FastAPI:
    app = FastAPI(
        title="Preceptor teacher",
        description="A shared teacher for knowledge distillation.",
        docs_url=None,  # theirs load scripts from another host; http_page.py has ours
        redoc_url=None,
    )

    app.add_middleware(_SmallBodies)
    app.add_middleware(GZipMiddleware, minimum_size=2048, compresslevel=5)
    app.add_middleware(LoggedRequests)
    _answer_errors(app)

    guard = Guard(authenticator)

    @app.get("/livez", summary="The process runs", response_class=Response)
    async def livez() -> Response:
        return Response("ok\n", media_type="text/plain")

    @app.get(
        "/readyz",
        summary="Queries should come here",
        response_class=Response,
        responses={503: {"description": "why not"}},
    )
    async def readyz() -> Response:
        if service.not_ready:
            return Response(f"{service.not_ready}\n", status_code=503, media_type="text/plain")
        return Response("ok\n", media_type="text/plain")

    @app.get(
        "/metrics",
        summary="Prometheus metrics, for viewers and admins",
        response_class=Response,
        dependencies=[Depends(guard.viewer)],
    )
    async def prometheus() -> Response:
        return Response(await metrics.page(), media_type=CONTENT_TYPE)

    @app.get("/v1/teacher", summary="The teachers served, as the Describe call gives them")
    async def teacher(asker: Annotated[Identity, Depends(guard.anyone)]) -> dict[str, Any]:
        return json_format.MessageToDict(await service.describe(pb.DescribeRequest(), asker.tenant))

    app.include_router(routes(guard, books))
    app.include_router(usage_routes(guard, books, service))
    add_pages(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Whatever goes wrong is said as {"reason", "detail"}."""

    def answer(
        request: Request, status: int, reason: str, detail: str, headers: Mapping[str, str] | None = None
    ) -> JSONResponse:
        request.state.reason = reason  # for the access log
        return JSONResponse({"reason": reason, "detail": detail}, status, headers)

    @app.exception_handler(TeacherServerError)
    async def refused(request: Request, error: TeacherServerError) -> JSONResponse:
        return answer(request, _STATUS.get(error.code, 500), error.reason, str(error))

    @app.exception_handler(StoreUnavailable)
    async def no_store(request: Request, error: StoreUnavailable) -> JSONResponse:
        return answer(request, 503, LedgerUnavailable.reason, f"{error}; ask again, or another replica")

    @app.exception_handler(RequestValidationError)
    async def misunderstood(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, 400, InvalidQuery.reason, "; ".join(map(_say, error.errors())))

    @app.exception_handler(HTTPException)
    async def no_such(request: Request, error: HTTPException) -> JSONResponse:
        reason = HTTPStatus(error.status_code).name  # NOT_FOUND, METHOD_NOT_ALLOWED
        return answer(request, error.status_code, reason, str(error.detail), error.headers)


def _say(problem: Mapping[str, Any]) -> str:
    """As in: query since: Input should be a valid date, got 'today'."""
    if problem["type"] == "json_invalid":
        return f"body: this is no JSON ({problem['ctx']['error']})"
    where = " ".join(map(str, problem["loc"]))
    given = "" if problem["type"] == "missing" else f", got {repr(problem['input'])[:100]}"
    return f"{where}: {problem['msg']}{given}"


class _SmallBodies:
    """Reads no more of a request than what is asked for here can hold: it is read before anybody is authenticated."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def receive_some() -> StarletteMessage:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > _MAX_BODY_BYTES:
                raise HTTPException(413, f"the request's body is too large; {_MAX_BODY_BYTES} bytes at most")
            return message

        await self._app(scope, receive_some, send)


class HttpApp:
    """`async with` binds the port and serves until left."""

    def __init__(
        self,
        service: Service,
        authenticator: Authenticator,
        metrics: Metrics,
        config: NetworkConfig,
        books: Books,
        *,
        certificates: Certificates | None = None,
        patience: Patience = Patience(),  # noqa: B008 - nobody can change it
    ) -> None:
        """Clear text without `certificates`."""
        # A peer that does not read its reply may not keep the process from ending.
        options: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none"}
        options |= {"server_header": False, "h11_max_incomplete_event_size": _MAX_HEADER_BYTES}
        self._server = _Uvicorn(
            uvicorn.Config(http_app(service, authenticator, metrics, books), timeout_graceful_shutdown=1, **options)
        )
        self._address = (config.host, config.http_port)
        self._tls = None if certificates is None else certificates.for_http()
        self._places = Places(config.max_connections, config.max_connections // 4)
        self._dropped = lambda reason: metrics.http_dropped.labels(reason).inc()
        self._patience = patience
        self.port = 0

    async def __aenter__(self) -> "HttpApp":
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        try:
            listening = socket.create_server(self._address, family=family)
        except OSError as error:
            raise OSError(f"http_port: cannot bind {self._address[1]} ({error}); give another --http-port") from error
        self.port = listening.getsockname()[1]
        # uvicorn keeps its connections; who gets one is decided here.
        self._task = asyncio.create_task(self._server.serve(sockets=[]))
        self._listening = await asyncio.get_running_loop().create_server(
            self._connection,
            sock=Listener(listening, self._places, self._dropped),
            ssl=self._tls,
            ssl_handshake_timeout=None if self._tls is None else _HANDSHAKE_SECONDS,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listening.close()
        self._server.should_exit = True
        await self._task

    def _connection(self) -> Connection:
        return Connection(
            config=self._server.config,
            server_state=self._server.server_state,
            app_state={},
            dropped=self._dropped,
            patience=self._patience,
        )


class _Uvicorn(uvicorn.Server):
    """uvicorn inside a loop that is ours: signals stay with whoever runs the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
