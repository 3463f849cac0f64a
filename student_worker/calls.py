"""The calls of one job to a teacher's replicas: deadlines, retries, the next replica, and our own exceptions."""

import logging
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any, cast

import grpc
import tenacity
from google.protobuf.message import Message

from protos import teacher_pb2 as pb
from protos.conformance import check_job_name
from student_worker.errors import (
    FingerprintChanged,
    NotTrusted,
    TeacherError,
    TeacherFailed,
    TeacherUnavailable,
    UnknownTeacher,
)
from student_worker.keeper import Keeper
from student_worker.replica import Flight
from student_worker.replicas import Replicas
from student_worker.status import Retryable, translated
from student_worker.tls import Tls, fault
from student_worker.trace import trace_headers

_log = logging.getLogger(__name__)
_OPTIONS = [
    ("grpc.max_send_message_length", 2**31 - 1),  # the server's Describe states the limit that counts
    ("grpc.max_receive_message_length", 2**31 - 1),
    # Left to itself gRPC waits ever longer, up to two minutes, before it connects again, and meanwhile fails each call
    # unseen: a server that took 25 s to start was found up to ten seconds later. The last one is how long an attempt
    # may last, handshakes included; its own is 20 s.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 3000),
    # A name may lead to many, as a headless Service of Kubernetes does. Those who tell of one another are found anyway
    # (replicas.py); of others gRPC would ask the first alone, and after a lost connection look for new ones half a
    # minute late.
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.dns_min_time_between_resolutions_ms", 2000),
    # All channels of a process to one address share one connection, and its waiting, unless told otherwise: a fresh
    # channel to a replica whose connection hangs would hang as well.
    ("grpc.use_local_subchannel_pool", 1),
]
_PROBED_SECONDS = 30.0
_BACKOFF = tenacity.wait_random_exponential(multiplier=0.05, max=5.0)
_LONGEST_WAIT_FOR_ANYBODY = 1.0  # a call that finds no server costs none


class _Journey:
    """One call's way from replica to replica."""

    def __init__(self, samples: int, timeout: float) -> None:
        self.samples = samples
        self.began = monotonic()
        self.deadline = self.began + timeout
        self.tried: set[str] = set()


class Calls:
    """Each call has `timeout` seconds, retries included, at whichever replicas there are. Thread-safe.

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
        self._seeds = len(addresses)
        self._timeout = timeout
        self._metadata = [("preceptor-job", job), *([("authorization", f"Bearer {token}")] if token else [])]
        self._tls = tls
        self._credentials = None if tls is None else tls.credentials()
        self._replicas = Replicas(addresses, self._connect, timeout)
        self._keeper: Keeper | None = None
        self._probed: dict[str, float] = {}  # when each address was last looked at
        self._distrusted: dict[str, float] = {}  # and when it was last found that trust is what lacks
        self.tenant = ""
        """Ours, as the server said that was asked to describe itself."""
        self.closed = threading.Event()

    def close(self) -> None:
        """Ends the calls in flight with TeacherUnavailable."""
        self.closed.set()
        self._replicas.close()

    @property
    def moves(self) -> bool:
        """Whether a query may be moved from one replica to another, which may come while it is under way."""
        return self._keeper is not None

    def describe(self, teacher: str, fingerprint: str) -> pb.TeacherDescription:
        """The teacher of that name and fingerprint (empty: the only one, any), found at any of the replicas.

        From here on calls go to its replicas alone. Not to be called twice at once.
        """
        self._replicas.expect(teacher, fingerprint)
        reply: pb.DescribeResponse = self(
            "Describe", pb.DescribeRequest(teacher=teacher), accept=partial(self._check_described, fingerprint)
        )
        (description,) = reply.teachers
        if not description.inputs or len(description.outputs) != 1 or len(description.outputs[0].shape) != 1:
            raise TeacherFailed("the server describes a teacher without inputs or without its one output")
        self.tenant = reply.tenant
        self._replicas.pin(description.name, description.fingerprint)
        self._replicas.learn(reply.replicas)
        if self._keeper is None and (self._seeds > 1 or reply.address or reply.replicas):
            self._keeper = Keeper(self._replicas, self.closed, self._metadata)
        return description

    def _check_described(self, fingerprint: str, reply: pb.DescribeResponse, address: str) -> None:
        if len(reply.teachers) != 1:
            names = [teacher.name for teacher in reply.teachers]
            raise UnknownTeacher(f"teacher: {names} are served at {address}; say which one you mean")
        if fingerprint not in ("", served := reply.teachers[0].fingerprint):
            self._replicas.learn(reply.replicas)  # the run's own may be among them
            raise FingerprintChanged(
                f"fingerprint: this run began with {fingerprint}, {address} serves {served}; bring that teacher back, "
                "or begin a new run",
                served,
            )

    def __call__(
        self,
        call: str,
        request: Message,
        samples: int = 1,
        *,
        accept: Callable[[Any, str], None] | None = None,
    ) -> Any:
        """The reply to one call, retried where it is worth it. Raises TeacherError, which names the call's trace.

        `samples` is its weight. `accept(reply, address)` raises FingerprintChanged or UnknownTeacher where another
        teacher has answered.
        """
        trace_id, headers = trace_headers()
        journey = _Journey(samples, self._timeout)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Retryable),
            stop=tenacity.stop_before_delay(self._timeout) | tenacity.stop_when_event_set(self.closed),
            wait=partial(self._wait, journey),
            sleep=tenacity.sleep_using_event(self.closed),
            before_sleep=partial(_tell, self._timeout) if call == "Describe" else None,
            reraise=True,
        )
        try:
            return retrying(self._attempt, call, request, journey, [*self._metadata, *headers], accept)
        except Retryable as error:
            raise self._given_up(error, journey, trace_id) from error
        except TeacherError as error:
            error.args = (f"{error} (trace {trace_id})",)
            raise

    def _attempt(
        self,
        call: str,
        request: Message,
        journey: _Journey,
        metadata: list[tuple[str, str]],
        accept: Callable[[Any, str], None] | None,
    ) -> Any:
        left = journey.deadline - monotonic()
        # Until somebody has answered nobody watches over the calls, so one who hangs has his share of the time only.
        patience = max(0.001, left if self._keeper else min(left, self._timeout / self._seeds))
        flight = self._replicas.take(journey.samples, journey.tried)
        if flight is None:
            raise Retryable("what was left to try has gone meanwhile")
        address = flight.replica.address
        journey.tried.add(address)
        try:
            reply = getattr(flight.link.stub, call)(request, timeout=patience, metadata=metadata)
        except ValueError as error:  # grpc's word for a channel that is closed
            self._replicas.dropped(flight)
            if self.closed.is_set():
                raise TeacherUnavailable("this client is closed") from error
            if not flight.link.left:
                raise
            raise Retryable(f"{address}: hangs") from error
        except grpc.RpcError as error:
            ours = translated(cast("grpc.Call", error), address)  # what a stub raises is both
            raise self._failed(flight, Retryable(f"{address}: hangs") if flight.link.left else ours) from error
        except BaseException:
            self._replicas.dropped(flight)
            raise
        try:
            if accept is not None:
                accept(reply, address)
        except TeacherError as error:
            raise self._failed(flight, error) from error
        self._replicas.answered(flight)
        return reply

    def _failed(self, flight: Flight, error: TeacherError) -> TeacherError:
        """What this says of the replica; and the error to raise, Retryable where others may answer."""
        address = flight.replica.address
        if isinstance(error, FingerprintChanged | UnknownTeacher):
            self._replicas.other(flight, error.served if isinstance(error, FingerprintChanged) else "")
            return error if self._replicas.all_other() else Retryable(str(error))
        if not isinstance(error, Retryable) or error.busy:
            self._replicas.refused(flight)
            return error
        if error.late and self._keeper:  # the call's own time is over; whether the replica hangs, the keeper sees
            self._replicas.dropped(flight)
            return error
        self._replicas.lost(flight, str(error))
        if not error.connected and not (self._keeper and self._replicas.in_rotation):
            self._check_trust(address)
        return error

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
        if all(now - self._distrusted.get(one, -math.inf) < _PROBED_SECONDS for one in self._replicas.addresses):
            raise NotTrusted(f"{address}: {reason}")
        _log.warning("%s: %s; asking the other addresses", address, reason)

    def _wait(self, journey: _Journey, state: tenacity.RetryCallState) -> float:
        """No time before the next replica; jittered backoff, and no less than the server's hint, once all refused."""
        if self._replicas.untried(journey.tried):
            return 0.0
        journey.tried.clear()
        error = state.outcome.exception() if state.outcome else None
        backoff = _BACKOFF(state)
        if not isinstance(error, Retryable):
            return backoff
        return error.retry_after + (backoff if error.connected else min(backoff, _LONGEST_WAIT_FOR_ANYBODY))

    def _given_up(self, error: Retryable, journey: _Journey, trace_id: str) -> TeacherError:
        seconds = f"{monotonic() - journey.began:.1f} s of at most {self._timeout:g} (trace {trace_id})"
        others = self._replicas.others()
        if others and self._replicas.heard < journey.began and not self.closed.is_set():
            who = ", ".join(f"{address} serves {served or 'another'}" for address, served in sorted(others.items()))
            return FingerprintChanged(
                f"fingerprint: this run began with {self._replicas.fingerprint}, of which nobody has answered; {who}; "
                f"bring that teacher back, or begin a new run ({error}; gave up after {seconds})"
            )
        return TeacherUnavailable(f"{error}; gave up after {seconds}")

    def _connect(self, address: str) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(address, options=_OPTIONS)
        return grpc.secure_channel(address, self._credentials, options=_OPTIONS)


def _tell(timeout: float, state: tenacity.RetryCallState) -> None:
    """A first call that finds nobody would be silent for the whole timeout."""
    if state.attempt_number == 1 and state.outcome:
        _log.warning("%s; trying for up to %g s", state.outcome.exception(), timeout)
