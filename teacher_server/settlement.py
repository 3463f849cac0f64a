"""What becomes of a forward pass: its answers delivered and cached, its samples and nanoseconds booked."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from protos import teacher_pb2 as pb
from teacher_server.auth import Caller
from teacher_server.batcher import split
from teacher_server.cache import AnswerCache
from teacher_server.errors import ForwardFailed, TeacherServerError
from teacher_server.metrics import Metrics
from teacher_server.postings import Charge, Request, Waste, runs
from teacher_server.purses import Hold
from teacher_server.queues import Array
from teacher_server.shares import ALL, Flight, Leg, Logits, Rows, Waiter

_log = logging.getLogger(__name__)


class Books(Protocol):
    """What a ledger must do. All but `forwarding` is called on the event loop's thread."""

    def forwarding(self, samples: int) -> int:
        """Numbers a forward pass that begins. From the batcher's thread. Raises TeacherServerError: not to begin."""

    async def begin(self, caller: Caller, request_id: str, digest: bytes) -> Request:
        """Raises InvalidQuery where the id had another content."""

    async def hold(self, caller: Caller, samples: int) -> Hold:
        """Reserves, all or none. Raises TeacherServerError: the caller cannot pay. It is never cancelled."""

    def hold_now(self, caller: Caller, samples: int) -> Hold | None:
        """As `hold`, where that needs no waiting."""

    def book(self, number: int, charges: Sequence[Charge], wasted: Sequence[Waste]) -> None:
        """What became of the forward pass of that number; the charges' holds have been paid from."""

    def answered(
        self,
        caller: Caller,
        *,
        asked: int,
        cached: int,
        coalesced: int,
        unasked: int = 0,
        request: Request | None = None,
    ) -> None:
        """A query has its answers; or, without `request`, it ended with no more of them than those it had paid for."""

    def budgets(self, caller: Caller) -> list[pb.Budget]:
        """Those that the caller draws on, as they stand."""


class _Account(NamedTuple):
    payer: Waiter | str
    """Or why it is wasted."""
    hold: Hold | None
    samples: int
    positions: str = ""


class Settlement:
    """Of all forward passes of one teacher. Wasted are

    failed     the pass raised, or answered NaN (with it all of that query's part that nobody else wanted)
    abandoned  nobody wanted it any more
    unpaid     its host had gone, and of those who still wanted it nobody could pay
    replay     the query had been answered, and charged, before
    """

    def __init__(
        self,
        cache: AnswerCache,
        books: Books,
        metrics: Metrics,
        teacher: pb.TeacherDescription,
        *,
        fail: Callable[[Waiter, Exception], None],
        forget: Callable[[Flight, Rows], None],
    ) -> None:
        """fail: a query ends. forget: rows of a flight cannot be joined any more."""
        self._cache = cache
        self._books = books
        self._metrics = metrics
        self._teacher = teacher
        self._fail = fail
        self._forget = forget

    def settle(
        self,
        number: int,
        parts: list[tuple[Leg, range]],
        nanoseconds: int,
        outcome: dict[str, Array] | TeacherServerError,
    ) -> None:
        """Delivers what one forward pass computed, and books it."""
        accounts: list[_Account] = []
        row = 0
        for leg, span in parts:
            if isinstance(outcome, dict):
                accounts += self._land(
                    number, leg, span, np.asarray(outcome["logits"], np.float32)[row : row + len(span)]
                )
            else:
                accounts.append(_Account("failed", None, len(span)))
            row += len(span)
        charges, wasted = [], []
        shares = split(nanoseconds, [account.samples for account in accounts])
        for (payer, hold, samples, positions), share in zip(accounts, shares, strict=True):
            if isinstance(payer, str) or hold is None:
                wasted.append(Waste(f"wasted/{payer}", samples, share))
                self._metrics.platform.labels("wasted", payer).inc(samples)
            else:
                charges.append(Charge(payer.caller, payer.request, samples, share, hold, positions))
                payer.charged += samples
                payer.device_nanoseconds += share
                self._metrics.charged(payer.caller, samples, share, self._teacher)
        self._books.book(number, charges, wasted)

    def _land(self, number: int, leg: Leg, span: range, logits: Logits) -> list[_Account]:
        """Delivers one part of a forward pass; who pays for it."""
        flight, rows, accounts = leg.flight, leg.rows_of(span.start, span.stop), []
        leg.landed = span.stop
        failed = not np.isfinite(logits).all()
        if failed:
            finite = np.isfinite(logits).all(axis=1)
            numbers = np.arange(flight.samples)[rows]
            _log.warning(
                "batch %d: the teacher answers NaN or infinity for %d of %d samples of job %r of tenant %r",
                *(number, np.count_nonzero(~finite), len(logits), leg.host.caller.job, leg.host.caller.tenant),
                extra={"trace_ids": leg.trace_ids},
            )
            self._forget(flight, numbers[~finite])
            for victim, position in flight.first_positions(numbers[~finite]):
                self._fail(victim, ForwardFailed(f"logits: the teacher answers NaN or infinity for sample {position}"))
            accounts.append(_Account("failed", None, int(np.count_nonzero(~finite))))
            leg.release(accounts[0].samples)
            rows, logits = numbers[finite], logits[finite]
        if len(logits):
            for some, waiter, account in self._payers(leg, rows, len(logits), "failed" if failed else "abandoned"):
                its_rows = rows if isinstance(some, slice) else np.arange(flight.samples)[rows][some]
                flight.deliver(its_rows, logits[some], waiter)
                positions = ""
                if waiter is not None and waiter.request is not None:
                    positions = runs(flight.positions(waiter, its_rows))
                accounts.append(account._replace(positions=positions))
            self._cache_answers(leg, rows, logits)
        if leg.landed == leg.samples:
            leg.end()
        return accounts

    def _payers(
        self, leg: Leg, rows: Rows, samples: int, unwanted: str
    ) -> Iterator[tuple[Rows, Waiter | None, _Account]]:
        """For some of the rows each: which, whose they are, and the account. `unwanted`: by whom nobody wants."""
        flight, host = leg.flight, leg.host
        if host in flight.shares:
            paid = _Account("replay", None, samples) if host.replayed else _Account(host, leg.pay(samples), samples)
            yield ALL, host, paid
            return
        leg.release(samples)
        left, wanted_by_any = np.ones(samples, np.bool_), np.zeros(samples, np.bool_)
        for waiter, wanted in flight.wanting(rows):
            wanted_by_any |= wanted
            his = np.flatnonzero(wanted & left)
            if not len(his):
                continue
            if waiter.replayed:
                yield his, waiter, _Account("replay", None, len(his))
            elif (hold := self._books.hold_now(waiter.caller, len(his))) is not None:
                hold.pay(len(his))
                yield his, waiter, _Account(waiter, hold, len(his))
            else:
                continue
            left[his] = False
        for reason, some in (("unpaid", left & wanted_by_any), (unwanted, left & ~wanted_by_any)):
            if some.any():
                yield np.flatnonzero(some), None, _Account(reason, None, int(np.count_nonzero(some)))

    def _cache_answers(self, leg: Leg, rows: Rows, logits: Logits) -> None:
        """Whoever asks from here on joins, until the answers can be read in the cache."""
        flight = leg.flight
        if flight.keys is None:
            return
        numbers = np.arange(flight.samples)[rows]
        if not (writes := flight.writes[numbers]).all():
            self._forget(flight, numbers[~writes])
            numbers, logits = numbers[writes], logits[writes]
            if not len(numbers):
                return
        flight.keep(numbers, logits)
        corrupt = np.isin(numbers, flight.corrupt) if len(flight.corrupt) else np.zeros(len(numbers), np.bool_)
        for overwrite in (False, True):
            some = corrupt == overwrite
            if some.any():
                its_rows = numbers[some]
                keys = [flight.keys[row] for row in its_rows.tolist()]
                written = partial(self._forget, flight, its_rows)
                if not self._cache.put(leg.host.caller, keys, logits[some], written, overwrite=overwrite):
                    written()
