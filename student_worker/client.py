"""The student's end of the contract: synchronous, a window of queries in flight, several addresses, own exceptions."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from time import monotonic
from types import TracebackType
from typing import Any, Literal, Self, cast

import grpc
import numpy as np
import tenacity
from google.protobuf.message import Message
from numpy.typing import NDArray
from torch import Tensor

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc, wire
from protos.conformance import check_inputs
from student_worker.answer import Answer, concatenated, decoded
from student_worker.errors import InvalidQuery, TeacherUnavailable, UnknownTeacher
from student_worker.status import Retryable, translated

Samples = Tensor | NDArray[np.generic] | Mapping[str, Tensor | NDArray[np.generic]]
CacheMode = Literal["use", "read_only", "bypass"]
Encoding = Literal["float32", "float16", "top_k"]

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

    Queries are split under the server's message limit, at most `window` parts are in flight, and a query has `timeout`
    seconds, retries included. UNAVAILABLE, a full queue and others' reserved budget are retried with jittered backoff,
    at the next address where there is one. The first answer pins the teacher's fingerprint: another one later raises
    FingerprintChanged. `encoding="top_k"` asks for the `k` largest logits and the tail's mass at `temperature`, which
    must then be the loss's. Every error is a student_worker.errors.TeacherError.
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
        if not all(addresses):
            raise ValueError(f"address: {address!r} names no server; give host:port, or several joined by commas")
        if window < 1 or timeout <= 0:
            raise ValueError(f"window and timeout must be positive, got {window} and {timeout}")
        self._teacher = teacher
        self._spec = pb.OutputSpec(name="logits", encoding=_ENCODINGS[encoding], k=k, temperature=temperature)
        self._timeout = timeout
        self._metadata = [("preceptor-job", job)]
        if token:
            self._metadata.append(("authorization", f"Bearer {token}"))
        self._addresses = addresses
        options = [
            ("grpc.max_send_message_length", _LARGEST_MESSAGE),
            ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
        ]
        self._channels = [grpc.insecure_channel(address, options=options) for address in addresses]
        self._stubs = [teacher_pb2_grpc.TeacherStub(channel) for channel in self._channels]
        self._current = 0
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._description: pb.TeacherDescription | None = None
        self._window = threading.BoundedSemaphore(window)
        self._pool = ThreadPoolExecutor(window, thread_name_prefix="teacher-client")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is in flight; waiting callers get TeacherUnavailable."""
        self._closed.set()
        for channel in self._channels:
            channel.close()
        self._pool.shutdown(cancel_futures=True)

    def describe(self) -> pb.TeacherDescription:
        """The teacher's description, fetched once: who answers, what it takes, what it gives, what it costs."""
        with self._lock:
            if self._description is None:
                reply = self._called("Describe", pb.DescribeRequest(teacher=self._teacher))
                if len(reply.teachers) != 1:
                    names = [teacher.name for teacher in reply.teachers]
                    raise UnknownTeacher(f"teacher: {names} are served at {self._addresses}; say which one you mean")
                self._description = reply.teachers[0]
            return self._description

    def label(self, x: Samples, *, request_id: str = "", cache_mode: CacheMode = "use") -> Answer:
        """The answers to the n samples `x` [n, ...] (or a mapping of named inputs), in their order.

        Values travel as they are: uint8 is raw pixels, floats are normalised as `describe()` says. The same
        `request_id` is charged once.
        """
        return self.submit(x, request_id=request_id, cache_mode=cache_mode).result()

    def submit(self, x: Samples, *, request_id: str = "", cache_mode: CacheMode = "use") -> "Future[Answer]":
        """Like `label`, without waiting; blocks while `window` parts are in flight."""
        description = self.describe()
        inputs = _named_arrays(x, description)
        try:
            check_inputs(inputs, description)
        except wire.MalformedMessage as error:
            raise InvalidQuery(str(error)) from error
        n = len(next(iter(inputs.values())))
        size = self._part_size(inputs, n, description)
        parts = []
        for number, (start, stop) in enumerate(pairwise([*range(0, n, size), n])):
            request = pb.LabelRequest(
                teacher=self._teacher,
                inputs=[wire.encode_tensor(name, array[start:stop]) for name, array in inputs.items()],
                outputs=[self._spec],
                request_id=f"{request_id}/{number}" if request_id else "",
                expected_fingerprint=description.fingerprint,
                cache_mode=_CACHE_MODES[cache_mode],
            )
            self._window.acquire()
            try:
                part = self._pool.submit(self._answered, request, stop - start, description)
            except RuntimeError as error:
                self._window.release()
                raise TeacherUnavailable("this client is closed") from error
            part.add_done_callback(lambda _: self._window.release())
            parts.append(part)
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _part_size(self, inputs: Mapping[str, NDArray[np.generic]], n: int, description: pb.TeacherDescription) -> int:
        """How many samples fit a request and their answers a reply."""
        room = description.limits.max_message_bytes - _MESSAGE_OVERHEAD
        sent = sum(array.nbytes for array in inputs.values()) // n
        received = 4 * (int(np.prod(description.outputs[0].shape)) + 2)
        fitting = room // max(sent, received)
        if fitting < 1:
            raise InvalidQuery(
                f"inputs: one sample takes {max(sent, received)} bytes, more than the server's limit of "
                f"{description.limits.max_message_bytes} for a message; raise its --max-message-bytes"
            )
        return min(n, fitting, description.limits.max_samples_per_query)

    def _answered(self, request: pb.LabelRequest, n: int, description: pb.TeacherDescription) -> Answer:
        return decoded(self._called("Label", request), n, description)

    def _called(self, call: str, request: Message) -> Any:
        """The reply to one call, retried where it is worth it."""
        deadline = monotonic() + self._timeout
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Retryable),
            stop=tenacity.stop_before_delay(self._timeout) | tenacity.stop_when_event_set(self._closed),
            wait=_wait,
            sleep=tenacity.sleep_using_event(self._closed),
            reraise=True,
        )
        try:
            return retrying(self._attempt, call, request, deadline)
        except Retryable as error:
            raise TeacherUnavailable(f"{error}; gave up after {self._timeout:g} s of trying") from error

    def _attempt(self, call: str, request: Message, deadline: float) -> Any:
        at = self._current
        # A server that hangs may use up its share of the time only, so that the others get their turn.
        patience = max(0.001, min(deadline - monotonic(), self._timeout / len(self._stubs)))
        try:
            return getattr(self._stubs[at], call)(request, timeout=patience, metadata=self._metadata)
        except ValueError as error:  # grpc's word for a closed channel
            raise TeacherUnavailable("this client is closed") from error
        except grpc.RpcError as error:
            ours = translated(cast("grpc.Call", error), self._addresses[at])  # what a stub raises is both
            if isinstance(ours, Retryable) and self._current == at:
                self._current = (at + 1) % len(self._stubs)
            raise ours from error


_BACKOFF = tenacity.wait_random_exponential(multiplier=0.05, max=5.0)


def _wait(state: tenacity.RetryCallState) -> float:
    """Jittered backoff, and not before the server's own hint."""
    error = state.outcome.exception() if state.outcome else None
    hint = error.retry_after if isinstance(error, Retryable) else 0.0
    return hint + _BACKOFF(state)


# ---------------------------------------------------------------- samples and answers


def _named_arrays(x: Samples, description: pb.TeacherDescription) -> dict[str, NDArray[np.generic]]:
    if not isinstance(x, Mapping):
        if len(description.inputs) != 1:
            names = [described.name for described in description.inputs]
            raise InvalidQuery(f"inputs: the teacher takes {names}; give a mapping from these names")
        x = {description.inputs[0].name: x}
    inputs = {}
    for name, value in x.items():
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


def _joined(parts: Sequence["Future[Answer]"]) -> "Future[Answer]":
    """One future for a query's parts: their answers in order, or the first part's error."""
    whole: Future[Answer] = Future()
    left = len(parts)
    lock = threading.Lock()

    def done(_: "Future[Answer]") -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        try:
            whole.set_result(concatenated([part.result() for part in parts]))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to whoever waits
            whole.set_exception(error)

    for part in parts:
        part.add_done_callback(done)
    return whole
