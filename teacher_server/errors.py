"""What can go wrong with a query, each with the status that its caller sees.

    TeacherServerError
    ├── InvalidQuery          INVALID_ARGUMENT     shape, dtype, range, non-finite, one id with other content
    ├── NotImplementedHere    UNIMPLEMENTED        a field or value that this server does not know
    ├── Unauthenticated       UNAUTHENTICATED
    ├── NotAllowed            PERMISSION_DENIED    what only an admin may
    ├── UnknownTeacher        NOT_FOUND
    ├── OtherFingerprint      FAILED_PRECONDITION
    ├── QueueFull             RESOURCE_EXHAUSTED   reason QUEUE_FULL, with a hint when to retry
    ├── BudgetReserved        RESOURCE_EXHAUSTED   reason BUDGET_RESERVED: queries under way hold the rest; a hint
    ├── BudgetSpent           RESOURCE_EXHAUSTED   reason BUDGET_SPENT: whose, how much, until when
    ├── PastDeadline          DEADLINE_EXCEEDED
    ├── Draining              UNAVAILABLE          this replica is going away: ask another
    ├── LedgerUnavailable     UNAVAILABLE          a budget cannot be drawn on, since Redis does not answer
    ├── DeviceLost            UNAVAILABLE          this replica's device is broken: ask another
    └── ForwardFailed         INTERNAL             the teacher's own code raised, or answered NaN

Codes are those of google.rpc.Code, which both transports map to their own; nothing here knows a transport.
"""

from google.rpc import code_pb2


class TeacherServerError(Exception):
    """Base of all that a caller is told. `reason` is the machine-readable kind, `retry_after` a hint in seconds."""

    code: int = code_pb2.INTERNAL
    reason: str = "INTERNAL"
    retry_after: float | None = None


class InvalidQuery(TeacherServerError):
    code = code_pb2.INVALID_ARGUMENT
    reason = "INVALID_QUERY"


class NotImplementedHere(TeacherServerError):
    code = code_pb2.UNIMPLEMENTED
    reason = "NOT_IMPLEMENTED"


class Unauthenticated(TeacherServerError):
    code = code_pb2.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class NotAllowed(TeacherServerError):
    code = code_pb2.PERMISSION_DENIED
    reason = "NOT_ALLOWED"


class UnknownTeacher(TeacherServerError):
    code = code_pb2.NOT_FOUND
    reason = "UNKNOWN_TEACHER"


class OtherFingerprint(TeacherServerError):
    code = code_pb2.FAILED_PRECONDITION
    reason = "OTHER_FINGERPRINT"


class QueueFull(TeacherServerError):
    code = code_pb2.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BudgetReserved(TeacherServerError):
    code = code_pb2.RESOURCE_EXHAUSTED
    reason = "BUDGET_RESERVED"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BudgetSpent(TeacherServerError):
    code = code_pb2.RESOURCE_EXHAUSTED
    reason = "BUDGET_SPENT"


class PastDeadline(TeacherServerError):
    code = code_pb2.DEADLINE_EXCEEDED
    reason = "PAST_DEADLINE"


class Draining(TeacherServerError):
    code = code_pb2.UNAVAILABLE
    reason = "DRAINING"


class LedgerUnavailable(TeacherServerError):
    code = code_pb2.UNAVAILABLE
    reason = "LEDGER_UNAVAILABLE"


class DeviceLost(TeacherServerError):
    code = code_pb2.UNAVAILABLE
    reason = "DEVICE_LOST"


class ForwardFailed(TeacherServerError):
    code = code_pb2.INTERNAL
    reason = "FORWARD_FAILED"
