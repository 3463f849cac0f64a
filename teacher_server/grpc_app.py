"""The contract over gRPC (asyncio), with health and reflection."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any, TypeVar, cast

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc
from teacher_server.auth import Authenticator, Caller
from teacher_server.config import NetworkConfig
from teacher_server.errors import QueueFull, TeacherServerError
from teacher_server.metrics import Metrics
from teacher_server.service import Service

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Teacher"].full_name
_MAX_MESSAGE_BYTES = 1000
_GRACE_SECONDS = 5.0  # for replies that are on their way, once nothing is computed any more
_Reply = TypeVar("_Reply")
_Context = grpc.aio.ServicerContext[Any, Any]


class GrpcApp:
    """`async with` opens the port, NOT_SERVING until told otherwise; leaving lets replies on their way arrive."""

    def __init__(self, service: Service, authenticator: Authenticator, metrics: Metrics, config: NetworkConfig) -> None:
        self._config = config
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=config.max_concurrent_calls,
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.so_reuseport", 0),  # a port that is taken must be an error, not a share of its traffic
            ],
        )
        self._health = health.aio.HealthServicer()
        self._servicer = _Servicer(service, authenticator, metrics, config.max_concurrent_calls)
        teacher_pb2_grpc.add_TeacherServicer_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.port = 0

    async def __aenter__(self) -> "GrpcApp":
        await self.set_serving(False)
        try:
            self.port = self._server.add_insecure_port(self._config.address(self._config.grpc_port))
        except RuntimeError as error:
            address = self._config.address(self._config.grpc_port)
            raise OSError(f"grpc_port: cannot bind {address}; is it taken? give another --grpc-port") from error
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(min(_GRACE_SECONDS, self._config.drain_seconds))

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    async def idle(self) -> None:
        """Waits until no call of the contract is under way; health and reflection streams do not count."""
        await self._servicer.idle.wait()


class _Servicer(teacher_pb2_grpc.TeacherServicer):
    def __init__(
        self, service: Service, authenticator: Authenticator, metrics: Metrics, max_concurrent_calls: int
    ) -> None:
        self._service, self._authenticator, self._metrics = service, authenticator, metrics
        self._calls: Counter[str] = Counter()  # under way, by tenant
        # Some stay free whatever one tenant does, for the others and for probes.
        self._max_calls_of_a_tenant = max(1, max_concurrent_calls // 2)
        self.idle = asyncio.Event()
        self.idle.set()

    async def Describe(self, request: pb.DescribeRequest, context: _Context) -> pb.DescribeResponse:
        return await self._answered("Describe", context, lambda _: self._service.describe(request))

    async def Label(self, request: pb.LabelRequest, context: _Context) -> pb.LabelResponse:
        remaining = context.time_remaining()
        deadline = None if remaining is None else monotonic() + remaining
        return await self._answered("Label", context, lambda caller: self._service.label(request, caller, deadline))

    async def Lookup(self, request: pb.LookupRequest, context: _Context) -> pb.LookupResponse:
        return await self._answered("Lookup", context, lambda caller: self._service.lookup(request, caller))

    async def Spend(self, request: pb.SpendRequest, context: _Context) -> pb.SpendResponse:
        return await self._answered("Spend", context, lambda caller: self._service.spend(request, caller))

    async def _answered(self, name: str, context: _Context, call: Callable[[Caller], Awaitable[_Reply]]) -> _Reply:
        """Runs `call` for the authenticated caller, counts its outcome and turns our errors into gRPC's."""
        code = code_pb2.CANCELLED  # what stands when the client goes away: CancelledError passes through
        refused = None
        try:
            metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
            caller = self._authenticator.caller(metadata)
            self._begin(caller.tenant, context)
            reply = await call(caller)
            code = code_pb2.OK
        except TeacherServerError as error:
            refused, code = _status(error), error.code  # not the error: its traceback holds the request
        except asyncio.CancelledError:
            if (remaining := context.time_remaining()) is not None and remaining <= 0:
                code = code_pb2.DEADLINE_EXCEEDED
            raise
        except Exception:
            code = code_pb2.INTERNAL
            raise
        finally:  # counted before the caller hears of it, so that nobody can ask sooner than it stands in /metrics
            self._metrics.requests.labels(name, code_pb2.Code.Name(code)).inc()
        if refused is not None:
            await context.abort_with_status(rpc_status.to_status(refused))
        return reply

    def _begin(self, tenant: str, context: _Context) -> None:
        """Counts a call of the tenant's until its reply is sent, or it ends otherwise."""
        if self._calls[tenant] >= self._max_calls_of_a_tenant:
            raise QueueFull(
                f"tenant {tenant!r} has {self._calls[tenant]} calls under way, the most that one may "
                "(half of --max-concurrent-calls); ask again when some have been answered",
                retry_after=0.1,
            )

        def end(_: object) -> None:
            self._calls[tenant] -= 1
            if not self._calls[tenant]:
                del self._calls[tenant]
            if not self._calls:
                self.idle.set()

        self._calls[tenant] += 1
        self.idle.clear()
        context.add_done_callback(cast("Any", end))  # gRPC's stub wants a name for what it gives by position


def _status(error: TeacherServerError) -> status_pb2.Status:
    """google.rpc.Status with an ErrorInfo (the reason) and, where there is a hint when to retry, a RetryInfo."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain="preceptor")]
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    text = str(error)
    content = text.encode()
    if len(content) > _MAX_MESSAGE_BYTES:  # it travels in trailers, which gRPC bounds; beyond, the code itself is lost
        text = f"{content[:_MAX_MESSAGE_BYTES].decode(errors='ignore')}... ({len(text)} characters)"
    status = status_pb2.Status(code=error.code, message=text)
    for detail in details:
        status.details.add().Pack(detail)
    return status
