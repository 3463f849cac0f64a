"""The access log: one line a call of the contract and one an HTTP request, when it has ended.

A Describe that goes well is for debugging only: each student of several replicas asks every 2 s who there is.

Never in it: tokens or any other header, samples, answers, query strings.
"""

import logging
import re
from dataclasses import dataclass
from http import HTTPStatus
from time import monotonic_ns
from typing import Any

from google.rpc import code_pb2
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protos import teacher_pb2 as pb
from teacher_server.auth import Caller
from teacher_server.tokens import PREFIX
from teacher_server.trails import Trail, concern

_log = logging.getLogger(__name__)
_SOURCES = {pb.SOURCE_COMPUTED: "computed", pb.SOURCE_CACHED: "cached", pb.SOURCE_COALESCED: "coalesced"}
_PATH_CHARACTERS = 256
_TOKEN = re.compile(rf"{PREFIX}[\w-]+")  # which somebody took for an address
_PROBES = {"/livez", "/readyz", "/metrics"}

Reply = pb.LabelResponse | pb.LookupResponse | pb.DescribeResponse | pb.SpendResponse


@dataclass(eq=False)
class Ended:
    """A call of the contract, once nothing more happens to it but that its reply is sent."""

    call: str
    """Its name in the contract."""
    trail: Trail
    ended: int
    code: int
    """google.rpc.Code."""
    reason: str
    """Why it was refused; empty where it was not."""
    caller: Caller | None
    """None where it is not known who asked."""
    peer: str
    request_bytes: int
    reply_bytes: int
    answered: dict[str, Any]
    """What `of_reply` says."""


def of_reply(reply: Reply | None) -> dict[str, Any]:
    """Answers by where they came from, and what the caller pays for."""
    if isinstance(reply, pb.LabelResponse):
        sources, cost = list(reply.sources), reply.cost
        return {
            **{name: sources.count(source) for source, name in _SOURCES.items()},
            "charged": cost.samples,
            "cost": cost.money_nanos / 1e9,
            "currency": cost.currency,
        }
    if isinstance(reply, pb.LookupResponse):
        return {"computed": 0, "cached": list(reply.found).count(True), "coalesced": 0}
    return {}


def log_call(ended: Ended) -> None:
    """Its line: an error where it failed for a fault of ours, information otherwise."""
    level = logging.INFO
    if ended.code == code_pb2.INTERNAL:
        level = logging.ERROR
    elif ended.call == "Describe" and ended.code == code_pb2.OK:
        level = logging.DEBUG
    if not _log.isEnabledFor(level):
        return
    trail = ended.trail
    queued, computing = trail.waited()
    fields = {
        "trace_id": trail.mark.trace_id,
        "call": ended.call,
        "code": code_pb2.Code.Name(ended.code),
        "tenant": ended.caller.tenant if ended.caller else "",
        "job": ended.caller.job if ended.caller else "",
        "peer": ended.peer,
        "request_bytes": ended.request_bytes,
        "reply_bytes": ended.reply_bytes,
        **ended.answered,
        "queue_ms": _milliseconds(queued),
        "compute_ms": _milliseconds(computing),
        "total_ms": _milliseconds(ended.ended - trail.began),
    }
    if ended.reason:
        fields["reason"] = ended.reason
    _log.log(level, "call", extra=fields)


class LoggedRequests:
    """HTTP requests, but for probes that go well.

    A route says by `request.state.tenant` whose it is, and by `request.state.reason` why it was refused.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        header = next((value for name, value in scope["headers"] if name == b"traceparent"), b"")
        trail = Trail.following(header.decode("latin-1"))
        concern(trail)  # for all of this request's task
        status, received, sent = 0, 0, 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status, sent
            status = message.get("status", status)
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        except Exception:
            status = status or HTTPStatus.INTERNAL_SERVER_ERROR  # which whoever serves us says in our place
            raise
        finally:
            if not (scope["path"] in _PROBES and 200 <= status < 300):
                host, port = scope.get("client") or ("", 0)
                fields = {
                    "trace_id": trail.mark.trace_id,
                    "call": f"{scope['method']} {_TOKEN.sub(PREFIX + '...', scope['path'])[:_PATH_CHARACTERS]}",
                    "code": status,  # 0: it went away before it was answered
                    "tenant": scope.get("state", {}).get("tenant", ""),
                    "peer": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
                    "request_bytes": received,
                    "reply_bytes": sent,
                    "total_ms": _milliseconds(monotonic_ns() - trail.began),
                }
                if reason := scope.get("state", {}).get("reason"):
                    fields["reason"] = reason
                level = logging.ERROR if status == HTTPStatus.INTERNAL_SERVER_ERROR else logging.INFO
                _log.log(level, "request", extra=fields)


def _milliseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)
