"""The HTTP side: probes, metrics, the teacher's description, OpenAPI docs."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from google.protobuf import json_format
from google.rpc import code_pb2
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from protos import teacher_pb2 as pb
from teacher_server.auth import Authenticator, Caller
from teacher_server.config import NetworkConfig
from teacher_server.errors import TeacherServerError
from teacher_server.metrics import Metrics
from teacher_server.service import Service

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


def http_app(service: Service, authenticator: Authenticator, metrics: Metrics) -> FastAPI:
    app = FastAPI(title="Preceptor teacher", description="A shared teacher for knowledge distillation.")

    @app.exception_handler(TeacherServerError)
    async def refused(_: Request, error: TeacherServerError) -> JSONResponse:
        return JSONResponse({"reason": error.reason, "detail": str(error)}, _STATUS.get(error.code, 500))

    def caller(request: Request) -> Caller:
        return authenticator.caller(request.headers)

    @app.get("/livez", summary="The process runs", response_class=Response)
    async def livez() -> Response:
        return Response("ok\n", media_type="text/plain")

    @app.get(
        "/readyz", summary="Queries are taken", response_class=Response, responses={503: {"description": "why not"}}
    )
    async def readyz() -> Response:
        if service.not_ready:
            return Response(f"{service.not_ready}\n", status_code=503, media_type="text/plain")
        return Response("ok\n", media_type="text/plain")

    @app.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get(
        "/v1/teacher", summary="The teachers served, as the Describe call gives them", dependencies=[Depends(caller)]
    )
    async def teacher() -> dict[str, Any]:
        return json_format.MessageToDict(await service.describe(pb.DescribeRequest()))

    return app


class HttpApp:
    """`async with` binds the port and serves until left."""

    def __init__(self, service: Service, authenticator: Authenticator, metrics: Metrics, config: NetworkConfig) -> None:
        # A peer that does not read its reply may not keep the process from ending.
        options: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off"}
        self._server = _Uvicorn(
            uvicorn.Config(http_app(service, authenticator, metrics), timeout_graceful_shutdown=1, **options)
        )
        self._address = (config.host, config.http_port)
        self.port = 0

    async def __aenter__(self) -> "HttpApp":
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        try:
            self._socket = socket.create_server(self._address, family=family)
        except OSError as error:
            raise OSError(f"http_port: cannot bind {self._address[1]} ({error}); give another --http-port") from error
        self.port = self._socket.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.should_exit = True
        await self._task
        self._socket.close()


class _Uvicorn(uvicorn.Server):
    """uvicorn inside a loop that is ours: signals stay with whoever runs the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
