"""One computation for all who ask the same: single flight, and who pays for it.

    answer -> join what is under way -> look up the rest in the cache -> hold spend -> batcher -> deliver, charge, cache

A sample is registered from the moment when it is asked for until its answer can be read in the cache, so there is no
gap in which two queries would both have it computed. A flight lives while one waiter lives. Its host, the oldest who
wants a sample, lends it his budget and his queue; when he leaves, what was not dispatched flies again for the next one,
and what was dispatched comes back for those who still wait, at the charge of the oldest of them who can pay.

Each forward pass is booked by itself, when it has ended: every sample and nanosecond of it, charged or wasted.
"""

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from functools import partial
from time import monotonic_ns
from typing import Any, Self

import numpy as np

from protos import teacher_pb2 as pb
from teacher_server.batcher import Batcher
from teacher_server.cache import AnswerCache
from teacher_server.errors import ForwardFailed, TeacherServerError
from teacher_server.metrics import Metrics
from teacher_server.purses import Hold
from teacher_server.queues import Array, Computed
from teacher_server.settlement import Books, Settlement
from teacher_server.shares import ALL, Flight, Leg, Outcome, Query, Rows, Share, Waiter
from teacher_server.trails import Pass

__all__ = ["Books", "Flights", "Outcome", "Query", "again"]

_log = logging.getLogger(__name__)


class Flights:
    """All queries to one teacher. `async with` waits for lookups and reservations under way. For one event loop.

    Give its `on_batch` to the batcher.
    """

    def __init__(
        self, batcher: Batcher, cache: AnswerCache, books: Books, metrics: Metrics, teacher: pb.TeacherDescription
    ) -> None:
        self._batcher = batcher
        self._cache = cache
        self._books = books
        self._metrics = metrics
        self._settlement = Settlement(cache, books, metrics, teacher, fail=self._fail, forget=self._forget)
        self._loop = asyncio.get_running_loop()
        self._flying: dict[bytes, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0)  # what the batcher's thread has told the loop comes first
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def answer(self, query: Query) -> Outcome:
        """Waits until every sample has its answer. Cancelled, it leaves; what others want goes on.

        Raises what the budget, the queue or the forward pass of any of its samples says: QueueFull, BudgetSpent,
        BudgetReserved, LedgerUnavailable, ForwardFailed, DeviceLost, Draining, InvalidQuery. Then nothing more is
        computed at its charge.
        """
        waiter = Waiter(query, self._loop.create_future())
        outcome = None
        try:
            self._board(waiter, query)
            await waiter.done
            outcome = waiter.outcome()
        finally:
            self._leave(waiter)
            if outcome is None and waiter.charged:  # what is paid for was asked, also by who leaves half-way
                self._books.answered(waiter.caller, asked=waiter.charged, cached=0, coalesced=0)
        waiter.accept()
        unasked = 0 if waiter.replayed else query.unasked  # they were counted with the first answer
        self._metrics.of(waiter.caller).unasked.inc(unasked)
        self._books.answered(
            waiter.caller,
            asked=len(outcome.sources),
            cached=outcome.count(pb.SOURCE_CACHED),
            coalesced=outcome.count(pb.SOURCE_COALESCED),
            unasked=unasked,
            request=waiter.request,
        )
        return outcome

    def on_batch(
        self,
        number: int,
        parts: list[tuple[object, range]],
        nanoseconds: int,
        outcome: dict[str, Array] | TeacherServerError,
    ) -> None:
        """The batcher's; from its thread. The loop sees it before the futures that this batch completes or fails."""
        self._loop.call_soon_threadsafe(self._computed, number, parts, nanoseconds, outcome, monotonic_ns())

    # ------------------------------------------------------------ asking

    def _board(self, waiter: Waiter, query: Query) -> None:
        keys, flying = query.keys, self._flying
        if keys is None:
            flight = Flight(None, query.samples)
            flight.join(waiter, None)
            self._launch(flight, ALL, query.inputs)
            return
        if flying.keys().isdisjoint(keys):
            fresh = dict.fromkeys(keys)
            if len(fresh) == len(keys):
                flight = Flight(keys, len(keys))
                flying.update(dict.fromkeys(keys, flight))
                flight.join(waiter, None)
                self._spawn(self._look_up(flight, query.inputs), flight)
                return
        self._board_some(waiter, query, keys)

    def _board_some(self, waiter: Waiter, query: Query, keys: list[bytes]) -> None:
        """Where some samples are under way already, or come more than once."""
        mine: dict[bytes, int] = {}
        firsts: list[int] = []
        theirs: dict[Flight, tuple[list[int], list[int]]] = {}
        rows, positions = [], []
        for position, key in enumerate(keys):
            if (flight := self._flying.get(key)) is not None:
                entry = theirs.setdefault(flight, ([], []))
                entry[0].append(flight.row(key))
                entry[1].append(position)
                continue
            if key not in mine:
                mine[key] = len(mine)
                firsts.append(position)
            rows.append(mine[key])
            positions.append(position)
        for flight, (its_rows, places) in theirs.items():
            flight.join(waiter, Share(np.array(its_rows, np.intp), np.array(places, np.intp)))
        if mine:
            flight = Flight(list(mine), len(mine))
            self._flying.update(dict.fromkeys(mine, flight))
            flight.join(waiter, Share(np.array(rows, np.intp), np.array(positions, np.intp)))
            self._spawn(self._look_up(flight, {name: array[firsts] for name, array in query.inputs.items()}), flight)
        else:
            waiter.accept()

    async def _look_up(self, flight: Flight, inputs: Mapping[str, Array]) -> None:
        keys, began = flight.keys or [], monotonic_ns()
        found = await self._cache.get(keys)
        flight.passage.looked_up, flight.passage.found = (began, monotonic_ns()), len(found.rows)
        flight.corrupt = found.corrupt
        if not len(found.rows):
            self._launch(flight, ALL, inputs)
            return
        for waiter, samples in flight.deliver_cached(found.rows, found.logits):
            self._cache.used(waiter.caller, keys, samples)
        self._forget(flight, found.rows)
        if len(found.rows) < len(keys):
            rest = np.delete(np.arange(len(keys)), found.rows)
            self._launch(flight, rest, {name: array[rest] for name, array in inputs.items()})

    # ------------------------------------------------------------ computing

    def _launch(self, flight: Flight, rows: Rows, inputs: Mapping[str, Array]) -> None:
        """Has these rows computed for the oldest who wants each; those that nobody wants are dropped."""
        for host, some in flight.owners(rows):
            whole = isinstance(some, slice)
            his = rows if whole else np.arange(flight.samples)[rows][some]
            if host is None:
                self._forget(flight, his)
                continue
            leg = Leg(flight, host, his, inputs if whole else {name: array[some] for name, array in inputs.items()})
            flight.legs.add(leg)
            if host.replayed:
                self._submit(leg, None)
            elif (hold := self._books.hold_now(host.caller, leg.samples)) is not None:
                self._submit(leg, hold)
            else:
                self._spawn(self._hold(leg), flight)

    async def _launch_again(self, flight: Flight, rows: Rows, inputs: Mapping[str, Array]) -> None:
        """In a task: one who leaves may make many others leave, one after another."""
        self._launch(flight, rows, inputs)

    async def _hold(self, leg: Leg) -> None:
        try:
            hold = await self._books.hold(leg.host.caller, leg.samples)
        except TeacherServerError as error:
            self._refuse(leg, error.with_traceback(None))
            return
        self._submit(leg, hold)

    def _submit(self, leg: Leg, hold: Hold | None) -> None:
        leg.board(hold)
        if leg.host not in leg.flight.shares:  # he left while we asked for his budget
            self._turn_down(leg)
            return
        try:
            leg.future = self._batcher.submit(*leg.host.caller, leg.inputs, tag=leg)
        except TeacherServerError as error:
            self._refuse(leg, error.with_traceback(None))
            return
        leg.host.accept()
        leg.future.add_done_callback(partial(self._ended, leg))

    def _refuse(self, leg: Leg, error: TeacherServerError) -> None:
        """The host may not have this computed: his query fails as a whole, and the next one is host."""
        if leg.host in leg.flight.shares:
            self._fail(leg.host, error)
        self._turn_down(leg)

    def _turn_down(self, leg: Leg) -> None:
        self._spawn(self._launch_again(leg.flight, leg.rows, leg.inputs), leg.flight)
        leg.end()

    def _ended(self, leg: Leg, future: Future[Computed]) -> None:
        """In the batcher's thread, mostly. Where all went well, `on_batch` has told the loop everything."""
        if future.cancelled() or future.exception() is not None:
            self._loop.call_soon_threadsafe(self._failed, leg, future)
        else:
            self._metrics.queue_seconds.observe(future.result().queue_seconds)

    def _failed(self, leg: Leg, future: Future[Computed]) -> None:
        """It was withdrawn, or will not be answered. What was computed of it has been delivered and booked before."""
        inputs = leg.inputs
        leg.end()
        if future.cancelled() or leg.landed == leg.samples:
            return
        rows, error = leg.rows_of(leg.landed, leg.samples), future.exception()
        if error is not None and not isinstance(error, ForwardFailed):
            self._fail_rows(leg.flight, rows, error)
        elif error is not None:
            # One sample is at fault, and who wants others of these only may not suffer for it.
            for waiter, wanted in leg.flight.wanting(rows):
                if waiter is leg.host or wanted.all():
                    self._fail(waiter, again(error))
            rest = {name: array[leg.landed : leg.samples] for name, array in inputs.items()}
            self._spawn(self._launch_again(leg.flight, rows, rest), leg.flight)

    # ------------------------------------------------------------ leaving

    def _leave(self, waiter: Waiter) -> None:
        flights, waiter.flights = waiter.flights, []
        for flight in flights:
            flight.shares.pop(waiter, None)
            for leg in [leg for leg in flight.legs if leg.host is waiter]:
                if leg.future is None:
                    continue  # it has not been submitted, and will not be
                kept = self._batcher.withdraw(leg.future)
                if kept < leg.samples:
                    rows, inputs = leg.withdrawn(kept)
                    self._spawn(self._launch_again(flight, rows, inputs), flight)
                if leg.landed == kept > 0:
                    leg.end()

    def _fail(self, waiter: Waiter, error: Exception) -> None:
        waiter.error = error
        waiter.wake()
        self._leave(waiter)

    def _fail_rows(self, flight: Flight, rows: Rows, error: BaseException) -> None:
        self._forget(flight, rows)
        for waiter, _ in flight.wanting(rows):
            self._fail(waiter, again(error))

    def _forget(self, flight: Flight, rows: Rows) -> None:
        """From here on these are looked up, and computed, anew."""
        if flight.keys is None:
            return
        for key in flight.keys[rows] if isinstance(rows, slice) else [flight.keys[row] for row in rows.tolist()]:
            if self._flying.get(key) is flight:
                del self._flying[key]

    # ------------------------------------------------------------ answers

    def _computed(
        self,
        number: int,
        parts: list[tuple[object, range]],
        nanoseconds: int,
        outcome: dict[str, Array] | TeacherServerError,
        ended: int,
    ) -> None:
        self._metrics.batch(number, parts, nanoseconds, outcome)
        legs = [(leg, span) for leg, span in parts if isinstance(leg, Leg)]
        try:
            self._settlement.settle(number, legs, nanoseconds, outcome)
        except Exception as error:  # noqa: BLE001 - nobody may be left waiting
            _log.exception("batch %d is not in the books, for a fault of ours", number)
            for leg, _ in legs:
                self._fail_rows(leg.flight, ALL, error)
        size, settled = sum(len(span) for _, span in parts), monotonic_ns()
        hosts = tuple([leg.host.trail.mark for leg, _ in legs])
        for (leg, span), host in zip(legs, hosts, strict=True):  # whoever was woken looks at it later
            leg.flight.passage.passes.append(
                Pass(host, number, size, len(span), hosts, leg.queued, ended - nanoseconds, ended, settled)
            )

    def _spawn(self, work: Coroutine[Any, Any, None], flight: Flight) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.error("queries fail for a fault of ours", exc_info=error)
                self._fail_rows(flight, ALL, error)

        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(ended)


def again(error: BaseException) -> Exception:
    """The same error for another caller: one that is raised twice would keep the frames of both."""
    if not isinstance(error, TeacherServerError):
        return TeacherServerError(f"a fault of the server: {type(error).__name__}: {error}")
    another = type(error).__new__(type(error), *error.args)
    another.__dict__.update(error.__dict__)
    return another
