"""Server reflection, for those who have a token."""

from collections import Counter
from collections.abc import AsyncIterable
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection_pb2 as pb
from grpc_reflection.v1alpha.reflection import aio

from teacher_server.auth import Authenticator
from teacher_server.errors import Unauthenticated

_STREAMS_OF_A_TENANT = 4


class Reflection(aio.ReflectionServicer):
    def __init__(self, authenticator: Authenticator, *services: str) -> None:
        super().__init__(services)
        self._authenticator = authenticator
        self._streams: Counter[str] = Counter()

    async def ServerReflectionInfo(  # type: ignore[override] # noqa: N802 - so it is called; the stubs forget `yield`
        self, request_iterator: AsyncIterable[pb.ServerReflectionRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterable[pb.ServerReflectionResponse]:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        try:
            tenant = self._authenticator.identify(metadata).tenant
        except Unauthenticated as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        if self._streams[tenant] >= _STREAMS_OF_A_TENANT:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"tenant {tenant!r} has {_STREAMS_OF_A_TENANT} reflection streams, the most that one may; end some",
            )
        self._streams[tenant] += 1
        try:
            async for reply in super().ServerReflectionInfo(request_iterator, context):  # type: ignore[attr-defined]
                yield reply
        finally:
            self._streams[tenant] -= 1
