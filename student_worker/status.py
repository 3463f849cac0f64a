"""gRPC's status codes and error details as exceptions of ours."""

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from student_worker.errors import (
    BudgetSpent,
    FingerprintChanged,
    InvalidQuery,
    NotAllowed,
    NotServed,
    TeacherError,
    TeacherFailed,
    TeacherUnavailable,
    UnknownTeacher,
)

_RETRYABLE = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,  # of one attempt: the query's own deadline ends the retries
    grpc.StatusCode.CANCELLED,  # by the server, which is closing
}
_RETRYABLE_REASONS = {"QUEUE_FULL", "BUDGET_RESERVED"}
_BY_CODE: dict[grpc.StatusCode, type[TeacherError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidQuery,
    grpc.StatusCode.FAILED_PRECONDITION: FingerprintChanged,
    grpc.StatusCode.NOT_FOUND: UnknownTeacher,
    grpc.StatusCode.UNAUTHENTICATED: NotAllowed,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowed,
    grpc.StatusCode.UNIMPLEMENTED: NotServed,
}


class Retryable(TeacherUnavailable):
    """Worth another try, at this address or the next."""

    def __init__(
        self, message: str, retry_after: float = 0.0, *, connected: bool = True, busy: bool = False, late: bool = False
    ) -> None:
        """`connected`: whether a server said so, and not gRPC since there was none. `busy`: he has no room for this
        just now. `late`: the time given to the call was over."""
        super().__init__(message)
        self.retry_after, self.connected = retry_after, connected
        self.busy, self.late = busy, late


def translated(error: grpc.Call, address: str) -> TeacherError:
    """Our exception for gRPC's: by status code, RESOURCE_EXHAUSTED by the reason in its details."""
    code, text = error.code(), f"{address}: {error.details()}"
    reason, retry_after = _details(error)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if reason == "BUDGET_SPENT":
            return BudgetSpent(text)
        # The last one is gRPC's own word, which comes without details; its others are about messages too large.
        if reason in _RETRYABLE_REASONS or "Concurrent RPC limit" in text:
            return Retryable(f"{code.name}: {text}", retry_after, busy=True)
        return InvalidQuery(text)
    if code in _RETRYABLE:
        connected = bool(reason) or code is not grpc.StatusCode.UNAVAILABLE
        late = code is grpc.StatusCode.DEADLINE_EXCEEDED
        return Retryable(f"{code.name}: {text}", retry_after, connected=connected, late=late)
    return _BY_CODE.get(code, TeacherFailed)(text)


def _details(error: grpc.Call) -> tuple[str, float]:
    """The reason and the hint in seconds when to retry, from google.rpc's error details."""
    reason, retry_after = "", 0.0
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    return reason, retry_after
