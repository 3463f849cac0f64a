"""The student's end of the contract: synchronous, a window of queries in flight, several addresses, own exceptions."""

import logging
import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from time import monotonic
from types import TracebackType
from typing import Any, Literal, Self, cast

import grpc
import numpy as np
import tenacity
from google.protobuf.message import Message
from torch import Tensor

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc, wire
from protos.conformance import check_inputs, check_job_name
from protos.wire import Array
from student_worker.answer import Answer, concatenated, decoded
from student_worker.errors import InvalidQuery, TeacherFailed, TeacherUnavailable, UnknownTeacher
from student_worker.status import Retryable, translated
from student_worker.threads import DaemonPool

Samples = Tensor | Array | Mapping[str, Tensor | Array]
CacheMode = Literal["use", "read_only", "bypass"]
Encoding = Literal["float32", "float16", "top_k"]

_log = logging.getLogger(__name__)
_BATCHES_A_PART = 4  # enough to keep a device busy, few enough that each part finishes well in time
_MESSAGE_OVERHEAD = 64 * 1024  # names, shapes and the reply's own fields, generously
_LARGEST_MESSAGE = 2**31 - 1  # the server's Describe states the limit that counts
_ENCODINGS = {"float32": pb.ENCODING_FLOAT32, "float16": pb.ENCODING_FLOAT16, "top_k": pb.ENCODING_TOP_K}
_CACHE_MODES = {
    "use": pb.CACHE_MODE_USE,
    "read_only": pb.CACHE_MODE_READ_ONLY,
    "bypass": pb.CACHE_MODE_BYPASS,
}


class TeacherClient:
    """A teacher at one address or several ("a:8001,b:8001"), asked on behalf of one job.

    A query is sent in parts of a few of the server's batches, at most `window` parts are in flight, and each has
    `timeout` seconds, retries included. UNAVAILABLE, a full queue and others' reserved budget are retried: at the next
    address where there is one, else with jittered backoff and not before the server's own hint. The first answer pins
    the teacher's fingerprint: another one later raises FingerprintChanged. `encoding="top_k"` asks for the `k` largest
    logits and the tail's mass at `temperature`, which must then be the loss's. Thread-safe. What goes wrong with a
    call is a student_worker.errors.TeacherError; an argument out of its range is a ValueError.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        job: str = "default",
        token: str | None = None,
        teacher: str = "",
        encoding: Encoding = "float32",
        k: int = 0,
        temperature: float = 1.0,
        window: int = 8,
        timeout: float = 60.0,
    ) -> None:
        addresses = address.split(",") if isinstance(address, str) else list(address)
        if not addresses or not all(addresses):
            raise ValueError(f"address: {address!r} names no server; give host:port, or several joined by commas")
        for one in addresses:
            if one.startswith(("http://", "https://")) or ":" not in one:
                raise ValueError(f"address: {one!r} is not host:port; give the gRPC port (8001 by default), no http://")
        if window < 1 or not 0 < timeout < math.inf:
            raise ValueError(f"window and timeout must be positive, got {window} and {timeout}")
        if encoding not in _ENCODINGS:
            raise ValueError(f"encoding is {encoding!r}: choose one of {', '.join(_ENCODINGS)}")
        if k < 0 or (encoding == "top_k") != (k > 0) or not 0 < temperature < math.inf:
            raise ValueError(
                f"encoding {encoding!r} with k {k} and temperature {temperature}: top_k takes a k of at least 1 and a "
                "finite temperature above 0, the others neither"
            )
        check_job_name(job)
        self._teacher = teacher
        self._spec = pb.OutputSpec(name="logits", encoding=_ENCODINGS[encoding], k=k, temperature=temperature)
        self._timeout = timeout
        self._metadata = [("preceptor-job", job)]
        token = (token or "").strip()
        if not (token.isascii() and token.isprintable()):
            raise ValueError("token: holds characters that no header can carry; give printable ASCII")
        if token:
            self._metadata.append(("authorization", f"Bearer {token}"))
        self._addresses = addresses
        options = [
            ("grpc.max_send_message_length", _LARGEST_MESSAGE),
            ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
        ]
        channels = [grpc.insecure_channel(address, options=options) for address in addresses]
        self._stubs = [teacher_pb2_grpc.TeacherStub(channel) for channel in channels]
        self._current = 0
        self._lock = threading.Lock()
        self._description: pb.TeacherDescription | None = None
        self._window = threading.BoundedSemaphore(window)
        self._closed = threading.Event()
        self._pool = DaemonPool(window, "teacher-client")
        # Also runs when a program ends without close(), so that calls in flight end before the interpreter does.
        self._close = weakref.finalize(self, _close, self._closed, channels, self._pool)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is in flight; waiting callers get TeacherUnavailable."""
        self._close()

    def describe(self) -> pb.TeacherDescription:
        """The teacher's description, fetched once: who answers, what it takes, what it gives, what it costs."""
        with self._lock:
            if self._description is None:
                reply = self._called("Describe", pb.DescribeRequest(teacher=self._teacher))
                if len(reply.teachers) != 1:
                    names = [teacher.name for teacher in reply.teachers]
                    raise UnknownTeacher(f"teacher: {names} are served at {self._addresses}; say which one you mean")
                (description,) = reply.teachers
                if not description.inputs or len(description.outputs) != 1 or len(description.outputs[0].shape) != 1:
                    raise TeacherFailed("the server describes a teacher without inputs or without its one output")
                self._description = description
            return self._description

    def label(self, x: Samples, *, request_id: str = "", cache_mode: CacheMode = "use") -> Answer:
        """The answers to the n samples `x` [n, ...] (or a mapping of named inputs), in their order.

        Values travel as they are: uint8 is raw pixels, floats are normalised as `describe()` says. The same
        `request_id` is charged once.
        """
        return self.submit(x, request_id=request_id, cache_mode=cache_mode).result()

    def submit(self, x: Samples, *, request_id: str = "", cache_mode: CacheMode = "use") -> "Future[Answer]":
        """Like `label`, without waiting for the answer; blocks while `window` parts are in flight.

        Once a part has failed, or the future was cancelled, no further part is sent. Callbacks of the future run in one
        of `window` threads that also ask: they must not wait for another answer.
        """
        if cache_mode not in _CACHE_MODES:
            raise ValueError(f"cache_mode is {cache_mode!r}: choose one of {', '.join(_CACHE_MODES)}")
        description = self.describe()
        inputs = _named_arrays(x, description)
        try:
            check_inputs(inputs, description)
        except wire.MalformedMessage as error:
            raise InvalidQuery(str(error)) from error
        n = len(next(iter(inputs.values())))
        bounds = list(pairwise([*range(0, n, self._part_size(inputs, n, description)), n]))
        whole = _Whole(len(bounds))
        for number, (start, stop) in enumerate(bounds):
            request = pb.LabelRequest(
                teacher=self._teacher,
                inputs=[wire.encode_tensor(name, array[start:stop]) for name, array in inputs.items()],
                outputs=[self._spec],
                request_id=f"{request_id}/{number}" if request_id else "",
                expected_fingerprint=description.fingerprint,
                cache_mode=_CACHE_MODES[cache_mode],
            )
            self._window.acquire()
            if whole.future.done() or self._closed.is_set():
                self._window.release()
                whole.fail(TeacherUnavailable("this client is closed"))
                break
            part = self._pool.submit(partial(self._answered, request, stop - start, description))
            part.add_done_callback(lambda _: self._window.release())
            whole.add(number, part)
        return whole.future

    def _part_size(self, inputs: Mapping[str, Array], n: int, description: pb.TeacherDescription) -> int:
        """How many samples to send at once: a few batches, as fit a request and their answers a reply."""
        limits = description.limits
        (classes,) = description.outputs[0].shape
        sent = sum(array.nbytes for array in inputs.values()) // n
        received = wire.answers_bytes(self._spec, 2, classes) - wire.answers_bytes(self._spec, 1, classes)
        fitting = (limits.max_message_bytes - _MESSAGE_OVERHEAD) // max(sent, received)
        if fitting < 1:
            raise InvalidQuery(
                f"inputs: one sample takes {max(sent, received)} bytes, more than the server's limit of "
                f"{limits.max_message_bytes} for a message; raise its --max-message-bytes"
            )
        return min(n, fitting, limits.max_samples_per_query, _BATCHES_A_PART * limits.max_batch_size)

    def _answered(self, request: pb.LabelRequest, n: int, description: pb.TeacherDescription) -> Answer:
        return decoded(self._called("Label", request), n, description, self._spec.encoding)

    def _called(self, call: str, request: Message) -> Any:
        """The reply to one call, retried where it is worth it."""
        began = monotonic()
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Retryable),
            stop=tenacity.stop_before_delay(self._timeout) | tenacity.stop_when_event_set(self._closed),
            wait=partial(_wait, len(self._stubs)),
            sleep=tenacity.sleep_using_event(self._closed),
            before_sleep=partial(_tell, self._timeout) if call == "Describe" else None,
            reraise=True,
        )
        try:
            return retrying(self._attempt, call, request, began + self._timeout)
        except Retryable as error:
            raise TeacherUnavailable(
                f"{error}; gave up after {monotonic() - began:.1f} s of at most {self._timeout:g}"
            ) from error

    def _attempt(self, call: str, request: Message, deadline: float) -> Any:
        at = self._current
        # A server that hangs may use up its share of the time only, so that the others get their turn.
        patience = max(0.001, min(deadline - monotonic(), self._timeout / len(self._stubs)))
        try:
            return getattr(self._stubs[at], call)(request, timeout=patience, metadata=self._metadata)
        except ValueError as error:
            if not self._closed.is_set():
                raise
            raise TeacherUnavailable("this client is closed") from error  # grpc's word for it
        except grpc.RpcError as error:
            ours = translated(cast("grpc.Call", error), self._addresses[at])  # what a stub raises is both
            if isinstance(ours, Retryable) and self._current == at:
                self._current = (at + 1) % len(self._stubs)
            raise ours from error


_BACKOFF = tenacity.wait_random_exponential(multiplier=0.05, max=5.0)


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


def _close(closed: threading.Event, channels: Sequence[grpc.Channel], pool: DaemonPool) -> None:
    closed.set()
    for channel in channels:
        channel.close()
    pool.close()


def _named_arrays(x: Samples, description: pb.TeacherDescription) -> dict[str, Array]:
    if not isinstance(x, Mapping):
        if len(description.inputs) != 1:
            names = [described.name for described in description.inputs]
            raise InvalidQuery(f"inputs: the teacher takes {names}; give a mapping from these names")
        x = {description.inputs[0].name: x}
    inputs: dict[str, Array] = {}
    for name, value in x.items():
        if not isinstance(value, Tensor | np.ndarray):
            raise InvalidQuery(f"inputs[{name!r}]: a {type(value).__name__} cannot be sent; give a tensor or an array")
        try:
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        except TypeError as error:
            raise InvalidQuery(f"inputs[{name!r}]: {value.dtype} cannot be sent; use .float() or uint8") from error
        if array.ndim == 0 or len(array) == 0:
            raise InvalidQuery(f"inputs[{name!r}]: shape {list(array.shape)} holds no sample; axis 0 counts samples")
        inputs[name] = array
    counts = {name: len(array) for name, array in inputs.items()}
    if len(set(counts.values())) != 1:
        raise InvalidQuery(f"inputs: sample counts on axis 0 differ: {counts}; they must be equal")
    return inputs


class _Whole:
    """The answer to a query of several parts: theirs in order, or the first error; then the other parts are dropped."""

    def __init__(self, parts: int) -> None:
        self.future: Future[Answer] = Future()
        self._answers: list[Answer | None] = [None] * parts
        self._parts: list[Future[Answer]] = []
        self._settled = False
        self._lock = threading.Lock()  # never held while a future's callbacks run: they may come back here
        self.future.add_done_callback(partial(_drop, self._parts))

    def add(self, number: int, part: "Future[Answer]") -> None:
        self._parts.append(part)
        part.add_done_callback(partial(self._done, number))

    def fail(self, error: BaseException) -> None:
        if self._settle():
            self.future.set_exception(error)

    def _done(self, number: int, part: "Future[Answer]") -> None:
        if part.cancelled():
            self.fail(TeacherUnavailable("this client is closed"))
        elif (error := part.exception()) is not None:
            self.fail(error)
        else:
            with self._lock:
                self._answers[number] = part.result()
                answers = [answer for answer in self._answers if answer is not None]
            if len(answers) == len(self._answers):
                whole = concatenated(answers)
                if self._settle():
                    self.future.set_result(whole)

    def _settle(self) -> bool:
        """True for the first who may set the future's outcome; never once its owner has cancelled it."""
        with self._lock:
            first, self._settled = not self._settled, True
        return first and self.future.set_running_or_notify_cancel()


def _drop(parts: "list[Future[Answer]]", _: "Future[Answer]") -> None:
    """Cancels what has not begun, and lets go of the rest: parts know their whole, and answers are large."""
    for part in list(parts):
        part.cancel()
    parts.clear()
