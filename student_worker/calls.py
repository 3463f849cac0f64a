"""The calls of one job to a teacher's servers: deadlines, retries, the next address, and our own exceptions."""

import logging
import math
import threading
from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import Any, cast

import grpc
import tenacity
from google.protobuf.message import Message

from protos import teacher_pb2_grpc
from protos.conformance import check_job_name
from student_worker.errors import NotTrusted, TeacherError, TeacherUnavailable
from student_worker.status import Retryable, translated
from student_worker.tls import Tls, fault
from student_worker.trace import trace_headers

_log = logging.getLogger(__name__)
_LARGEST_MESSAGE = 2**31 - 1  # the server's Describe states the limit that counts
_PROBED_SECONDS = 30.0
_BACKOFF = tenacity.wait_random_exponential(multiplier=0.05, max=5.0)


class Calls:
    """Each call has `timeout` seconds, retries included, at one of the addresses. Thread-safe.

    Without `tls` in clear text. Raises ValueError for addresses, a job, a token or a timeout that cannot be used.
    """

    def __init__(
        self, address: str | Sequence[str], *, job: str, token: str | None, timeout: float, tls: Tls | None = None
    ) -> None:
        addresses = address.split(",") if isinstance(address, str) else list(address)
        if not addresses or not all(addresses):
            raise ValueError(f"address: {address!r} names no server; give host:port, or several joined by commas")
        for one in addresses:
            if one.startswith(("http://", "https://")) or ":" not in one:
                raise ValueError(f"address: {one!r} is not host:port; give the gRPC port (8001 by default), no http://")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be positive and finite, got {timeout}")
        check_job_name(job)
        token = (token or "").strip()
        if not (token.isascii() and token.isprintable()):
            raise ValueError("token: holds characters that no header can carry; give printable ASCII")
        self.addresses = addresses
        self._timeout = timeout
        self._metadata = [("preceptor-job", job), *([("authorization", f"Bearer {token}")] if token else [])]
        options = [
            ("grpc.max_send_message_length", _LARGEST_MESSAGE),
            ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
        ]
        self._tls = tls
        self._channels = [
            grpc.insecure_channel(address, options=options)
            if tls is None
            else grpc.secure_channel(address, tls.credentials(), options=options)
            for address in addresses
        ]
        self._probed: dict[str, float] = {}  # when each address was last looked at
        self._distrusted: dict[str, float] = {}  # and when it was last found that trust is what lacks
        self._stubs = [teacher_pb2_grpc.TeacherStub(channel) for channel in self._channels]
        self._current = 0
        self.closed = threading.Event()

    def close(self) -> None:
        """Ends the calls in flight with TeacherUnavailable."""
        self.closed.set()
        for channel in self._channels:
            channel.close()

    def __call__(self, call: str, request: Message) -> Any:
        """The reply to one call, retried where it is worth it. Raises TeacherError, which names the call's trace."""
        began = monotonic()
        trace_id, headers = trace_headers()
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Retryable),
            stop=tenacity.stop_before_delay(self._timeout) | tenacity.stop_when_event_set(self.closed),
            wait=partial(_wait, len(self._stubs)),
            sleep=tenacity.sleep_using_event(self.closed),
            before_sleep=partial(_tell, self._timeout) if call == "Describe" else None,
            reraise=True,
        )
        try:
            return retrying(self._attempt, call, request, began + self._timeout, [*self._metadata, *headers])
        except Retryable as error:
            raise TeacherUnavailable(
                f"{error}; gave up after {monotonic() - began:.1f} s of at most {self._timeout:g} (trace {trace_id})"
            ) from error
        except TeacherError as error:
            error.args = (f"{error} (trace {trace_id})",)
            raise

    def _attempt(self, call: str, request: Message, deadline: float, metadata: list[tuple[str, str]]) -> Any:
        at = self._current
        # A server that hangs may use up its share of the time only, so that the others get their turn.
        patience = max(0.001, min(deadline - monotonic(), self._timeout / len(self._stubs)))
        try:
            return getattr(self._stubs[at], call)(request, timeout=patience, metadata=metadata)
        except ValueError as error:
            if not self.closed.is_set():
                raise
            raise TeacherUnavailable("this client is closed") from error  # grpc's word for it
        except grpc.RpcError as error:
            ours = translated(cast("grpc.Call", error), self.addresses[at])  # what a stub raises is both
            if isinstance(ours, Retryable) and self._current == at:
                self._current = (at + 1) % len(self._stubs)
            if isinstance(ours, Retryable) and not ours.connected:
                self._check_trust(self.addresses[at])
            raise ours from error

    def _check_trust(self, address: str) -> None:
        """Raises NotTrusted where no connection came about for want of trust, and at no other address either.

        Then trying again would not help; while another may answer, it is a warning.
        """
        now = monotonic()
        if now - self._probed.get(address, -math.inf) < _PROBED_SECONDS:
            return
        self._probed[address] = now
        if (reason := fault(address, self._tls)) is None:
            self._distrusted.pop(address, None)
            return
        self._distrusted[address] = now
        if all(now - self._distrusted.get(one, -math.inf) < _PROBED_SECONDS for one in self.addresses):
            raise NotTrusted(f"{address}: {reason}")
        _log.warning("%s: %s; asking the other addresses", address, reason)


def _tell(timeout: float, state: tenacity.RetryCallState) -> None:
    """A first call that finds nobody would be silent for the whole timeout."""
    if state.attempt_number == 1 and state.outcome:
        _log.warning("%s; trying for up to %g s", state.outcome.exception(), timeout)


def _wait(addresses: int, state: tenacity.RetryCallState) -> float:
    """No time before the next address; jittered backoff, and no less than the server's hint, once all refused."""
    if state.attempt_number % addresses:
        return 0.0
    error = state.outcome.exception() if state.outcome else None
    hint = error.retry_after if isinstance(error, Retryable) else 0.0
    return hint + _BACKOFF(state)
