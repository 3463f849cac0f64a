"""The way of a query: admit, look up and join, compute, answer. Knows no transport."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from importlib.metadata import version
from time import monotonic
from typing import NamedTuple, TypeVar

from blake3 import blake3

from protos import teacher_pb2 as pb
from protos.keys import sample_keys
from protos.wire import MalformedMessage, encode_answers
from teacher_server import accounts
from teacher_server.admission import Admitted, admit, admit_lookup, check_fields, claimed_bytes
from teacher_server.auth import Caller
from teacher_server.batcher import Batcher
from teacher_server.cache import SAMPLE_BYTES, AnswerCache, Logits, beside_the_loop
from teacher_server.errors import (
    Draining,
    InvalidQuery,
    PastDeadline,
    TeacherServerError,
    UnknownTeacher,
)
from teacher_server.flights import Books, Flights, Outcome, Query, again
from teacher_server.metrics import Metrics
from teacher_server.registry import Registry
from teacher_server.trails import Trail

_Result = TypeVar("_Result")
_SOURCES = {pb.SOURCE_COMPUTED: "computed", pb.SOURCE_CACHED: "cached", pb.SOURCE_COALESCED: "coalesced"}
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Served:
    """A teacher, the batcher that feeds it, and those who see that as little as possible is computed, and paid."""

    description: pb.TeacherDescription
    batcher: Batcher
    cache: AnswerCache
    flights: Flights
    books: Books


class _Asked(NamedTuple):
    """A query as it was admitted."""

    content: Admitted
    keys: list[bytes] | None
    """Of its samples; None where nobody needs them."""
    mode: pb.CacheMode
    namespace: str
    request_id: str
    digest: bytes
    """Of what is asked, not of how: keys and outputs. Empty without an id."""
    trail: Trail


@dataclass(eq=False)
class _Running:
    """A query with a request id, for all calls that wait for it."""

    digest: bytes
    task: asyncio.Task[pb.LabelResponse | TeacherServerError]
    waiting: int = 0


class Service:
    """Every call of the contract, on messages; errors are those of `errors.py`."""

    def __init__(self, metrics: Metrics, accounts: accounts.Books) -> None:
        self._metrics = metrics
        self._accounts = accounts
        self._teachers: dict[str, Served] = {}
        self._running: dict[tuple[Caller, str], _Running] = {}
        self.not_ready: str | None = "loading the teacher"
        """Why nobody should come here any more, or yet; some may still do."""
        self._takes = False
        self.registry: Registry | None = None
        """Who else serves, where it is known."""

    def serve(self, teacher: Served) -> None:
        self._teachers[teacher.description.name] = teacher
        self.not_ready, self._takes = None, True

    def leave(self, why: str) -> None:
        """From here on it is not ready, and queries are taken all the same."""
        self.not_ready = why

    def drain(self, why: str) -> None:
        """From here on queries are refused with UNAVAILABLE; those already queued are finished."""
        self.not_ready, self._takes = why, False

    async def describe(self, request: pb.DescribeRequest, tenant: str = "") -> pb.DescribeResponse:
        """`tenant`: the caller's, who is told of it."""
        check_fields(request)
        if not self._teachers:
            raise Draining(f"this replica describes no teacher yet ({self.not_ready}); ask again, or another one")
        teachers = [self._teacher(request.teacher)] if request.teacher else self._teachers.values()
        reply = pb.DescribeResponse(
            teachers=[teacher.description for teacher in teachers],
            server_version=version("preceptor"),
            tenant=tenant,
        )
        if self.registry is not None:
            reply.address = self.registry.address
            reply.replicas.extend(self.registry.replicas())
        return reply

    async def label(
        self, request: pb.LabelRequest, caller: Caller, deadline: float | None, trail: Trail | None = None
    ) -> pb.LabelResponse:
        """Answers one query. `deadline` is a time.monotonic() moment; past it nothing is computed for it any more.

        A query with a request id is computed once for all calls that wait for it, as long as one does: each has its
        own deadline, so what is computed has the last one's.
        """
        outcome = "internal"
        try:
            reply = await self._label(request, caller, deadline, trail or Trail())
            outcome = "answered"
        except TeacherServerError as error:
            outcome = error.reason
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self._metrics.query(caller, outcome)
        return reply

    async def _label(
        self, request: pb.LabelRequest, caller: Caller, deadline: float | None, trail: Trail
    ) -> pb.LabelResponse:
        self._check_taken()
        check_fields(request)
        size = claimed_bytes(request)
        teacher = self._teacher(request.teacher)
        samples = request.inputs[0].shape[0] if request.inputs and request.inputs[0].shape else 0  # as it says
        asked = await beside_the_loop(size + samples * SAMPLE_BYTES, _look_through, request, teacher.description, trail)
        if deadline is not None and deadline <= monotonic():
            raise PastDeadline("the deadline had passed on arrival; give the call more time")
        work = self._answer_once if asked.request_id else self._answer
        return await _until(deadline, work(teacher, caller, asked))

    async def lookup(self, request: pb.LookupRequest, caller: Caller) -> pb.LookupResponse:
        """Which answers are cached; of none, no answers are in the reply."""
        self._check_taken()
        check_fields(request)
        teacher = self._teacher(request.teacher)
        keys, specs, unasked = admit_lookup(request, teacher.description)
        cached = teacher.cache.keys(caller, request.cache_namespace, keys)
        found = await teacher.cache.get(cached)
        there = [False] * len(keys)
        for row in found.rows.tolist():
            there[row] = True
        reply = pb.LookupResponse(fingerprint=teacher.description.fingerprint, found=there)
        samples = len(found.rows)
        if samples or unasked:
            teacher.books.answered(caller, asked=samples, cached=samples, coalesced=0, unasked=unasked)
            self._metrics.of(caller).unasked.inc(unasked)
        if samples:
            counters = self._metrics.of(caller)
            counters.asked.inc(samples)
            counters.sources["cached"].inc(samples)
            teacher.cache.used(caller, cached, samples)
            reply.answers.extend(await beside_the_loop(found.logits.nbytes, _encode, found.logits, specs))
        return reply

    async def spend(self, request: pb.SpendRequest, caller: Caller) -> pb.SpendResponse:
        """The ledger of the caller's tenant, this replica's own last queries included."""
        check_fields(request)
        return await self._accounts.spend(caller, request)

    def _teacher(self, name: str) -> Served:
        if not name and len(self._teachers) == 1:
            return next(iter(self._teachers.values()))
        try:
            return self._teachers[name]
        except KeyError:
            raise UnknownTeacher(f"teacher: {name!r} is not served here; one of {sorted(self._teachers)}") from None

    def _check_taken(self) -> None:
        if not self._takes:
            raise Draining(f"this replica takes no queries ({self.not_ready}); ask another one")

    async def _answer_once(self, teacher: Served, caller: Caller, asked: _Asked) -> pb.LabelResponse:
        key = (caller, asked.request_id)
        running = self._running.get(key)
        if running is None:
            task = asyncio.get_running_loop().create_task(self._outcome(teacher, caller, asked))
            running = self._running[key] = _Running(asked.digest, task)
        elif running.digest != asked.digest:
            raise InvalidQuery(
                f"request_id: {asked.request_id[:128]!r} is under way for other samples or outputs; an id stands for "
                "one content, so give this query another one"
            )
        running.waiting += 1
        try:
            outcome = await asyncio.shield(running.task)
        finally:
            running.waiting -= 1
            if not running.waiting:
                running.task.cancel()
                if self._running.get(key) is running:
                    del self._running[key]
        if isinstance(outcome, TeacherServerError):
            raise again(outcome)
        return outcome

    async def _outcome(self, teacher: Served, caller: Caller, asked: _Asked) -> pb.LabelResponse | TeacherServerError:
        """The reply or the refusal, as a value that several callers can have."""
        try:
            return await self._answer(teacher, caller, asked)
        except TeacherServerError as error:
            return error.with_traceback(None)

    async def _answer(self, teacher: Served, caller: Caller, asked: _Asked) -> pb.LabelResponse:
        inputs, samples, specs, unasked = asked.content
        request = await teacher.books.begin(caller, asked.request_id, asked.digest) if asked.request_id else None
        counters = self._metrics.of(caller)
        keys = None
        if asked.keys is not None and asked.mode != pb.CACHE_MODE_BYPASS:
            keys = teacher.cache.keys(caller, asked.namespace, asked.keys)
        writes = asked.mode in {pb.CACHE_MODE_UNSPECIFIED, pb.CACHE_MODE_USE}
        outcome = await teacher.flights.answer(
            Query(
                caller,
                inputs,
                keys,
                writes,
                request,
                accepted=lambda: counters.asked.inc(samples),
                unasked=unasked,
                trail=asked.trail,
            )
        )
        for source, name in _SOURCES.items():
            if there := outcome.count(source):
                counters.sources[name].inc(there)
        reply = await beside_the_loop(outcome.logits.nbytes, _reply, teacher.description, specs, outcome)
        reply.budgets.extend(teacher.books.budgets(caller))
        return reply


def _look_through(request: pb.LabelRequest, description: pb.TeacherDescription, trail: Trail) -> _Asked:
    """All that takes longer the more samples there are."""
    content = admit(request, description)
    keys, digest = None, b""
    if request.request_id or request.cache_mode != pb.CACHE_MODE_BYPASS:
        keys = sample_keys(description.fingerprint, content.inputs)
    if request.request_id and keys is not None:
        digest = _digest(keys, content.specs)
    return _Asked(content, keys, request.cache_mode, request.cache_namespace, request.request_id, digest, trail)


def _digest(keys: list[bytes], specs: list[pb.OutputSpec]) -> bytes:
    """The same for what means the same, whether defaults were spelt out or not."""
    hasher = blake3(b"".join(keys))
    for spec in specs:
        encoding = spec.encoding or pb.ENCODING_FLOAT32
        top = (spec.k, spec.temperature or 1.0) if encoding == pb.ENCODING_TOP_K else ()
        hasher.update(repr((spec.name, int(encoding), *top)).encode())
    return hasher.digest(length=_DIGEST_BYTES)


def _encode(logits: Logits, specs: list[pb.OutputSpec]) -> list[pb.Answers]:
    try:
        return [encode_answers(logits, spec) for spec in specs]
    except MalformedMessage as error:
        raise InvalidQuery(str(error)) from error


def _reply(description: pb.TeacherDescription, specs: list[pb.OutputSpec], outcome: Outcome) -> pb.LabelResponse:
    return pb.LabelResponse(
        fingerprint=description.fingerprint,
        answers=_encode(outcome.logits, specs),
        sources=outcome.sources.tolist(),
        cost=pb.Cost(
            samples=outcome.charged,
            money_nanos=outcome.charged * description.price.nanos_per_sample,
            currency=description.price.currency,
            flops=outcome.charged * description.flops_per_sample,
            device_nanoseconds=outcome.device_nanoseconds,
        ),
    )


async def _until(deadline: float | None, work: Awaitable[_Result]) -> _Result:
    """Raises PastDeadline at that time.monotonic() moment, which is the event loop's clock too."""
    if deadline is None:
        return await work
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError:
        raise PastDeadline("the deadline passed while it waited; what nobody else waits for is not computed") from None
