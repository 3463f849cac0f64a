"""grpc.health.v1 for anybody: probes carry no token, so what they may take is bounded, each peer's share too.

The library's own servicer has gRPC read each message whole before it is called, up to the largest query that the port
takes, and forgets all other watchers of a service when one of them leaves.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2 as pb

from teacher_server.places import Places

SERVICE_NAME = "grpc.health.v1.Health"
_READING_SECONDS = 5.0
_MAX_MESSAGE_BYTES = 1024
_Context = grpc.aio.ServicerContext[Any, Any]


class Health:
    """The whole server's status, under each of the names that it serves. For the event loop's thread."""

    def __init__(self, *services: str) -> None:
        self._services = ("", *services)
        self._status = pb.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()
        self._closed = False
        # What is being read may be a large message; a stream costs little.
        self._reading, self._streams = Places(32, 4), Places(128, 16)

    def set_serving(self, serving: bool) -> None:
        self._status = pb.HealthCheckResponse.SERVING if serving else pb.HealthCheckResponse.NOT_SERVING
        self._wake()

    def close(self) -> None:
        """Ends the streams of those who watch, who would stay for ever."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def handler(self) -> grpc.GenericRpcHandler:
        # Streams of one message, so that it is read when we say so.
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Check": grpc.stream_unary_rpc_method_handler(self._check, response_serializer=_serialized),
                "Watch": grpc.stream_stream_rpc_method_handler(self._watch, response_serializer=_serialized),
            },
        )

    async def _check(self, _: object, context: _Context) -> pb.HealthCheckResponse:
        name = await self._asked(context)
        if name not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service: one of {list(self._services)}")
        return pb.HealthCheckResponse(status=self._status)

    async def _watch(self, _: object, context: _Context) -> AsyncIterator[pb.HealthCheckResponse]:
        name = await self._asked(context)
        with _place(self._streams, context) as lacking:
            if lacking:
                await _refuse(context)
            told = None
            while not self._closed:
                changed = self._changed
                unknown = name not in self._services
                status = pb.HealthCheckResponse.SERVICE_UNKNOWN if unknown else self._status
                if status != told:
                    yield pb.HealthCheckResponse(status=status)
                    told = status
                await changed.wait()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this server ends; watch another one")

    async def _asked(self, context: _Context) -> str:
        with _place(self._reading, context) as lacking:
            if lacking:
                await _refuse(context)
            name = await _named(context)
        if name is None:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"no HealthCheckRequest of at most {_MAX_MESSAGE_BYTES} bytes"
            )
        return name


async def _named(context: _Context) -> str | None:
    """The service that a call's message names. Nothing else keeps the message: an error's traceback would."""
    try:
        async with asyncio.timeout(_READING_SECONDS):
            message = await context.read()
    except TimeoutError:
        return None
    if not isinstance(message, bytes) or len(message) > _MAX_MESSAGE_BYTES:
        return None
    try:
        return str(pb.HealthCheckRequest.FromString(message).service)
    except DecodeError:
        return None


def _serialized(reply: pb.HealthCheckResponse) -> bytes:
    return bytes(reply.SerializeToString())


@contextmanager
def _place(places: Places, context: _Context) -> Iterator[str]:
    """A place for the peer of a call; gives what `Places.take` says is lacking."""
    address = context.peer().partition(":")[2].rpartition(":")[0].removeprefix("%5B").removesuffix("%5D")
    lacking = places.take(address)
    try:
        yield lacking
    finally:
        if not lacking:
            places.leave(address)


async def _refuse(context: _Context) -> None:
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many health calls at once; ask again in a while")
