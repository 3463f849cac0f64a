"""The contract's calls over gRPC: who asks, whether there is room for it, and only then the message.

A call is one message each way, but it is served as a stream of one: so its message is read when we say so, and a caller
who may not ask, or has too much under way already, costs us its headers alone.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from time import monotonic, monotonic_ns
from typing import Any, cast
from urllib.parse import unquote

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos import teacher_pb2 as pb
from teacher_server.access import Ended, Reply, log_call, of_reply
from teacher_server.admission import Request, check_message
from teacher_server.auth import Authenticator, Caller
from teacher_server.errors import InvalidQuery, PastDeadline, QueueFull, TeacherServerError
from teacher_server.metrics import Metrics
from teacher_server.service import Service
from teacher_server.trails import Trail, concern

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Teacher"].full_name
_MAX_ERROR_BYTES = 1000
_RECEIVED_AT_ONCE = 8  # messages of one tenant; what is being received has no known size yet
_RECEIVING_SECONDS = 60.0
_RETRY_SECONDS = 0.1
_ASKING = frozenset({"Label", "Lookup"})  # what a viewer may not
_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(eq=False)
class Call:
    """One call while it is served."""

    name: str
    caller: Caller
    deadline: float | None
    """A time.monotonic() moment."""
    received: int = 0
    """Bytes of its message, once it is there."""
    trail: Trail = field(default_factory=Trail)


@dataclass(eq=False)
class _Tenant:
    """What one tenant has under way."""

    calls: int = 0
    bytes: int = 0
    receiving: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_RECEIVED_AT_ONCE))


_Work = Callable[[Any, Call], Awaitable[Reply]]


class Calls:
    """Reads, answers and counts them. `idle` is set while none is under way."""

    def __init__(
        self,
        service: Service,
        authenticator: Authenticator,
        metrics: Metrics,
        *,
        max_concurrent_calls: int,
        max_tenant_bytes: int,
        on_end: Callable[[Ended], None] = log_call,
    ) -> None:
        self._authenticator, self._metrics, self._on_end = authenticator, metrics, on_end
        self._work: dict[type[Request], _Work] = {
            pb.DescribeRequest: lambda request, call: service.describe(request, call.caller.tenant),
            pb.LabelRequest: lambda request, call: service.label(request, call.caller, call.deadline, call.trail),
            pb.LookupRequest: lambda request, call: service.lookup(request, call.caller),
            pb.SpendRequest: lambda request, call: service.spend(request, call.caller),
        }
        self._tenants: dict[str, _Tenant] = {}
        # Some stay free whatever one tenant does, for the others and for probes.
        self._max_calls = max(1, max_concurrent_calls // 2)
        self._max_bytes = max_tenant_bytes
        self.idle = asyncio.Event()
        self.idle.set()

    def handler(self) -> grpc.GenericRpcHandler:
        calls = pb.DESCRIPTOR.services_by_name["Teacher"].methods
        kinds = {request.DESCRIPTOR.full_name: request for request in self._work}
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                call.name: grpc.stream_unary_rpc_method_handler(
                    partial(self._answered, call.name, kinds[call.input_type.full_name])
                )
                for call in calls
            },
        )

    async def _answered(self, name: str, kind: type[Request], _messages: object, context: _Context) -> bytes:
        """Answers one call, counts and logs its outcome and turns our errors into gRPC's."""
        trail = Trail.following(_traceparent(context))
        concern(trail)  # for all of this call's task
        call: Call | None = None
        reply: Reply | None = None
        message, refused, reason = b"", None, ""
        code = code_pb2.CANCELLED  # what stands when the client goes away: CancelledError passes through
        try:
            call = self._begin(name, context)
            call.trail = trail
            request = _parsed(kind, await self._received(call, context))
            reply = await self._work[kind](request, call)
            message = reply.SerializeToString()
            code = code_pb2.OK
        except TeacherServerError as error:  # nothing of it is kept: its traceback holds the request
            refused, code, reason = _status(error), error.code, error.reason
        except asyncio.CancelledError:
            if (remaining := context.time_remaining()) is not None and remaining <= 0:
                code = code_pb2.DEADLINE_EXCEEDED
            raise
        except Exception:
            code = code_pb2.INTERNAL
            raise
        finally:  # counted before the caller hears of it, so that nobody can ask sooner than it stands in /metrics
            self._metrics.request(name, code_pb2.Code.Name(code))
            ended = Ended(
                call=name,
                trail=trail,
                ended=monotonic_ns(),
                code=code,
                reason=reason,
                caller=call.caller if call else None,
                peer=unquote(context.peer()).partition(":")[2],  # of ipv4:HOST:PORT, ipv6:%5BHOST%5D:PORT
                request_bytes=call.received if call else 0,
                reply_bytes=len(message),
                answered=of_reply(reply),
            )
            asyncio.get_running_loop().call_soon(self._on_end, ended)  # the reply need not wait for it
        if refused is not None:
            await context.abort_with_status(rpc_status.to_status(refused))
        return message

    def _begin(self, name: str, context: _Context) -> Call:
        """Counts a call of its tenant's until its reply is sent, or it ends otherwise."""
        remaining = context.time_remaining()
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        caller = self._authenticator.caller(metadata, asks=name in _ASKING)
        call = Call(name, caller, None if remaining is None else monotonic() + remaining)
        tenant = self._tenants.setdefault(caller.tenant, _Tenant())
        if tenant.calls >= self._max_calls:
            raise QueueFull(
                f"tenant {caller.tenant!r} has {tenant.calls} calls under way, the most that one may "
                "(half of --max-concurrent-calls); ask again when some have been answered",
                retry_after=_RETRY_SECONDS,
            )

        def end(_: object) -> None:
            tenant.calls -= 1
            tenant.bytes -= call.received
            if not tenant.calls:
                del self._tenants[caller.tenant]
            if not self._tenants:
                self.idle.set()

        tenant.calls += 1
        self.idle.clear()
        context.add_done_callback(cast("Any", end))  # gRPC's stub wants a name for what it gives by position
        return call

    async def _received(self, call: Call, context: _Context) -> bytes:
        """The call's message. Raises QueueFull where its tenant has too many bytes under way."""
        tenant = self._tenants[call.caller.tenant]
        try:
            async with tenant.receiving, asyncio.timeout(_RECEIVING_SECONDS):
                message = await context.read()
        except TimeoutError:
            raise PastDeadline(
                f"the message had not arrived after {_RECEIVING_SECONDS:g} s; send smaller ones"
            ) from None
        if not isinstance(message, bytes):
            raise InvalidQuery(f"{call.name}: the call was closed without a message")
        call.received = len(message)
        tenant.bytes += len(message)
        if tenant.bytes > self._max_bytes:
            raise QueueFull(
                f"tenant {call.caller.tenant!r} has queries of {tenant.bytes} bytes under way, more than the "
                f"{self._max_bytes} that one may (--max-tenant-queue-bytes); ask again when some have been answered",
                retry_after=_RETRY_SECONDS,
            )
        return message


def _traceparent(context: _Context) -> str | None:
    values = [value for key, value in context.invocation_metadata() or () if key == "traceparent"]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else None


def _parsed(kind: type[Request], message: bytes) -> Request:
    check_message(kind, message)
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise InvalidQuery(f"{kind.DESCRIPTOR.name}: this is no such message ({error})") from error


def _status(error: TeacherServerError) -> status_pb2.Status:
    """google.rpc.Status with an ErrorInfo (the reason) and, where there is a hint when to retry, a RetryInfo."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain="preceptor")]
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    text = str(error)
    content = text.encode()
    if len(content) > _MAX_ERROR_BYTES:  # it travels in trailers, which gRPC bounds; beyond, the code itself is lost
        text = f"{content[:_MAX_ERROR_BYTES].decode(errors='ignore')}... ({len(text)} characters)"
    status = status_pb2.Status(code=error.code, message=text)
    for detail in details:
        status.details.add().Pack(detail)
    return status
