"""Who pays: reservations ahead of a forward pass, charges after it, and the way of both to Redis.

    begin      a request id: is it new, or paid for already?
    hold       samples of a budget, before they are computed; from this replica's purse, or from Redis (purses.py)
    book       what a forward pass computed: charged to whom, or wasted; into the journal at once (journal.py)
    post       records of the journal, summed (postings.py), applied in one step (ledger.lua), once and in their order

Nobody waits for Redis but for its word on a request id, and for a reservation that the purse cannot give. What Redis
decides stands: a charge beyond a budget, because its lease had lapsed meanwhile, is not made but booked as wasted.
"""

import asyncio
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from redis.exceptions import ResponseError

from protos import teacher_pb2 as pb
from teacher_server.auth import Caller
from teacher_server.config import LedgerConfig
from teacher_server.errors import InvalidQuery, LedgerUnavailable
from teacher_server.journal import Journal, LeftBehind, Record, left_behind
from teacher_server.postings import Charge, Entry, Request, Waste, booked, charged, posting, settle
from teacher_server.purses import Hold, Purses
from teacher_server.script import PLATFORM, run, this_hour
from teacher_server.store import LEDGER_PREFIX, Store, StoreUnavailable

_MAX_REQUEST_ID = 256
_POST_SECONDS = 0.05  # between postings, so that many queries share one
_FORGET_SECONDS = 1.0

_log = logging.getLogger(__name__)


class LedgerState(NamedTuple):
    """Of one replica, since its process began."""

    epoch: str
    forwarded: int
    """Samples of forward passes that have begun."""
    taken: int
    """Of these, samples that Redis says it has booked."""
    pending: int
    """Of these, samples under way or in postings of which Redis has not said that it has them."""
    pending_seconds: float
    """For how long the oldest record has been waiting to be posted; 0 where none is."""


@dataclass
class _Kept:
    """A posting that Redis may not have on its disk yet."""

    content: dict[str, Any]
    samples: Counter[Caller]
    """Of what is not known to be applied yet."""
    forwarded: int
    """Samples forwarded, in this and all earlier postings."""
    since: float
    """time.monotonic() of its oldest record."""


class Ledger:
    """The ledger of one replica that serves one teacher. `async with` settles what an earlier process left behind,
    and posts until left. All but `forwarding` is for the event loop's thread.

    Entering raises StoreUnavailable where Redis does not answer.
    """

    def __init__(
        self, store: Store, config: LedgerConfig, directory: Path, teacher: pb.TeacherDescription, *, who: str
    ) -> None:
        """`directory` is for the journal. `who` stands in the audit for a change of the teacher's price."""
        price = teacher.price
        self.store = store
        self._config = config
        self._directory = directory
        self._teacher = teacher
        self._who = who
        self._epoch = f"{int(time.time())}-{secrets.token_hex(4)}"
        header = {"fingerprint": teacher.fingerprint, "price": price.nanos_per_sample, "currency": price.currency}
        self._left = list(left_behind(directory))
        self._journal = Journal(directory, self._epoch, header)
        self._purses = Purses(store, self._epoch, price, config.lease_seconds)
        self._pending: list[Record] = []
        self._kept: dict[int, _Kept] = {}  # by their number
        self._number = self._applied = self._forgotten = 0
        self._forwarded = self._booked = self._taken = self._booked_and_forgotten = 0  # samples
        self._pending_since = 0.0
        self._unsettled: Counter[Caller] = Counter()  # charged here, not yet in what Redis says is spent
        self._finished: dict[tuple[Caller, str], bytes] = {}  # paid for here, as Redis is still to hear
        self._version = -1
        self._connected_since = store.connected_since
        self._posting = asyncio.Lock()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.states = self._purses.states

    async def __aenter__(self) -> Self:
        for left in self._left:
            await settle(self.store, left, self._config)
        await self._tell_teacher()
        await self._read_owners()
        self._tasks = [asyncio.create_task(self._post_forever()), asyncio.create_task(self._forget_forever())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self.post(closing=True)
        except (StoreUnavailable, LedgerUnavailable) as error:
            _log.warning("the last postings stay in %s until a server starts there: %s", self._directory, error)
        self._journal.close()

    async def begin(self, caller: Caller, request_id: str, digest: bytes) -> Request:
        """A query with an id; `digest` is of its content. Raises InvalidQuery where the id had another content.

        Without Redis it counts as new unless it was answered here; what is paid twice is found when it is posted.
        """
        if (size := len(request_id.encode())) > _MAX_REQUEST_ID:
            raise InvalidQuery(f"request_id: {size} bytes; at most {_MAX_REQUEST_ID}")
        known = "new"
        if (finished := self._finished.get((caller, request_id))) is not None:
            known = "finished" if finished == digest else "other"
        else:
            with suppress(StoreUnavailable):
                known = await run(
                    self.store,
                    "begin",
                    tenant=caller.tenant,
                    job=caller.job,
                    id=request_id,
                    digest=digest.hex(),
                    request_ms=1000 * self._config.request_record_seconds,
                )
        if known == "other":
            raise InvalidQuery(
                f"request_id: {request_id!r} was used by job {caller.job!r} for other samples or outputs; an id stands "
                "for one content, so give this query another one"
            )
        return Request(request_id, digest, known == "finished")

    async def hold(self, caller: Caller, samples: int) -> Hold:
        """Reserves samples of all budgets that the caller draws on, all of them or none.

        Raises BudgetSpent, BudgetReserved, or LedgerUnavailable where the purse has less and Redis does not answer.
        """
        return await self._purses.hold(caller, samples, self.post)

    def hold_now(self, caller: Caller, samples: int) -> Hold | None:
        """As `hold`, without asking Redis: None where the purse has less."""
        return self._purses.take(caller, samples)

    def forwarding(self, samples: int) -> int:
        """Numbers a forward pass that begins. For any thread, one at a time.

        Raises LedgerUnavailable where the journal cannot be written.
        """
        number = self._journal.forwarding(samples)
        self._forwarded += samples
        return number

    def book(self, number: int, charges: Sequence[Charge], wasted: Sequence[Waste]) -> None:
        """What became of the forward pass of that number: its samples and nanoseconds are the sums of the parts'."""
        lines, now = [], this_hour()
        for charge in charges:
            # What was held of a day's budget is that day's, also where it is computed after midnight.
            hour = now if now.startswith(charge.hold.day) else f"{charge.hold.day}T23"
            request_id = charge.request.id if charge.request else ""
            part = Entry(request_id, charge.samples, charge.nanoseconds, charge.hold.lease, charge.positions)
            lines.append(booked(charge.caller, hour, charges=[part]))
            self._unsettled[charge.caller] += charge.samples
        for waste in wasted:
            part = Entry("", waste.samples, waste.nanoseconds, "", "")
            lines.append(booked(Caller(PLATFORM, waste.account), now, charges=[part]))
        parts: list[Charge | Waste] = [*charges, *wasted]
        totals = [sum(part.samples for part in parts), sum(part.nanoseconds for part in parts)]
        self._booked += totals[0]
        self._record({"lines": lines, "totals": totals}, number)

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
        """A query has its answers; the same request id costs nothing from here on.

        `unasked` are the samples that the student had to choose from, and left.
        """
        finished = [request.id] if request else []
        if request and asked > cached + coalesced:
            self._finished[caller, request.id] = request.digest
        line = booked(
            caller,
            this_hour(),
            asked=asked,
            cached=cached,
            coalesced=coalesced,
            unasked=unasked,
            finished=finished,
        )
        self._record({"lines": [line], "totals": [0, 0]}, None)

    def budgets(self, caller: Caller) -> list[pb.Budget]:
        """What is left of the budgets that the caller draws on, as far as this replica knows."""
        return self._purses.budgets(
            caller,
            lambda tenant, job: sum(
                samples
                for other, samples in self._unsettled.items()
                if other.tenant == tenant and job in ("", other.job)
            ),
        )

    def state(self) -> LedgerState:
        """How far Redis is behind, as far as is known here."""
        applied = self._kept.get(self._applied)
        due = self._kept.get(self._applied + 1)
        since = due.since if due else self._pending_since if self._pending else None
        return LedgerState(
            self._epoch,
            self._forwarded,
            self._taken,
            self._forwarded - (applied.forwarded if applied else self._booked_and_forgotten),
            0.0 if since is None else time.monotonic() - since,
        )

    async def post(self, *, closing: bool = False) -> None:
        """Brings Redis up to date, renews what is held, gives back what is not needed.

        Raises StoreUnavailable, or LedgerUnavailable where the journal cannot be written.
        """
        async with self._posting:
            if self._pending:
                self._journal.posted(self._number + 1)
                self._number += 1
                records, self._pending = self._pending, []
                self._kept[self._number] = _Kept(
                    self._content(records), charged(records), self._booked, self._pending_since
                )
            if self._connected_since != self.store.connected_since:  # Redis may have lost what it had given
                self._purses.doubt([purse.lease for purse in self._purses.leases()])
                self._connected_since = self.store.connected_since
                self._version = -1  # or it was put back to an older state, whose count of changes may be the same
            back = self._purses.excess(all_of_it=closing)
            while True:
                reply = await self._apply(self._applied + 1, back)
                back = []
                self._note(reply["applied"], reply["forwarded"])
                if self._applied >= self._number:
                    break
            self._purses.learn(reply["budgets"])
        if reply["version"] != self._version:
            if not await self.store.command("EXISTS", f"{LEDGER_PREFIX}teacher:{self._teacher.fingerprint}"):
                await self._tell_teacher()
            await self._read_owners()

    # ------------------------------------------------------------ inside

    def _record(self, record: Record, number: int | None) -> None:
        try:
            self._journal.record(record, number)
        except LedgerUnavailable as error:  # it did happen; Redis can still be told
            _log.error("not in the journal, and lost if this process ends before Redis has it: %s", error)
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending.append(record)
        self._wake.set()

    def _content(self, records: Iterable[Record]) -> dict[str, Any]:
        price = self._teacher.price
        return posting(records, self._teacher.fingerprint, price.nanos_per_sample, price.currency)

    async def _apply(self, number: int, back: list[tuple[str, int]]) -> dict[str, Any]:
        """The posting of that number, or none where there is none: a heartbeat."""
        kept = self._kept.get(number)
        purses, sent = self._purses.leases(), time.monotonic()
        try:
            reply: dict[str, Any] = await run(
                self.store,
                "apply",
                epoch=self._epoch,
                base=self._forgotten,
                posting=number if kept else 0,
                **(kept.content if kept else self._content([])),
                release=back,
                renew=[purse.lease for purse in purses],
                lease_ms=self._purses.lease_ms,
                request_ms=1000 * self._config.request_record_seconds,
                watch=self._purses.watched(),
            )
        except BaseException:
            self._purses.doubt(lease for lease, _ in back)
            raise
        if gone := reply.get("gone"):
            _log.error("postings %d to %d are lost: the ledger was put back to an older state", *gone)
        for purse in purses:
            purse.renewed = sent
        self._purses.doubt(reply["lost"])
        return reply

    def _note(self, applied: int, forwarded: int) -> None:
        """Redis has applied so many postings of this epoch, with so many samples forwarded."""
        if (known := max(applied, self._forgotten)) < self._applied:
            _log.warning("Redis has lost postings %d to %d; they are repeated", known + 1, self._applied)
        for number in range(self._applied + 1, applied + 1):
            if (kept := self._kept.get(number)) is not None:
                self._unsettled -= kept.samples  # what reaches zero goes
                kept.samples = Counter()
                for line in kept.content["lines"]:
                    for request_id in line["finished"]:
                        self._finished.pop((Caller(line["tenant"], line["job"]), request_id), None)
        self._applied, self._taken = applied, forwarded

    async def _tell_teacher(self) -> None:
        """What a sample costs and takes, without which lines have no FLOPs."""
        price = self._teacher.price
        await run(
            self.store,
            "teacher",
            fingerprint=self._teacher.fingerprint,
            name=self._teacher.name,
            flops=repr(self._teacher.flops_per_sample),
            price=price.nanos_per_sample,
            currency=price.currency,
            who=self._who,
        )

    async def _read_owners(self) -> None:
        reply = await run(self.store, "owners")
        self._purses.owners_are({(tenant, job) for tenant, _, job in (o.partition("\t") for o in reply["owners"])})
        self._version = reply["version"]

    async def _post_forever(self) -> None:
        beat = min(1.0, self._config.lease_seconds / 4)
        beaten, trouble = time.monotonic(), ""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(beat):  # wait_for may swallow a cancellation that meets the event
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self.post()
                trouble = ""
            except (StoreUnavailable, LedgerUnavailable) as error:  # what is pending stays pending
                if trouble != str(error):
                    trouble = str(error)
                    _log.warning("not posted yet: %s", trouble)
            if time.monotonic() > beaten + beat:
                beaten = time.monotonic()
                self._purses.beat()
            await asyncio.sleep(_POST_SECONDS)

    async def _forget_forever(self) -> None:
        """Drops what Redis has on its disk: postings, and the journals of earlier processes."""
        known: deque[tuple[float, int, list[LeftBehind]]] = deque()  # by when Redis had applied what
        while True:
            await asyncio.sleep(_FORGET_SECONDS)
            if not self._kept and not self._left:
                continue
            with suppress(StoreUnavailable, ResponseError, OSError):  # a file that stays is settled already
                settled = [left for left in self._left if (await self._of(left.epoch))[0] >= max(left.postings)]
                applied, forwarded = await self._of(self._epoch)
                self._note(applied, forwarded)  # before another posting's reply can be
                known.append((time.time(), applied, settled))
                first, last = await self.store.durable()
                while known and known[0][0] < last:
                    at, applied, settled = known.popleft()
                    if at >= first:  # Redis cannot have lost it in between
                        self._forget(applied, settled)

    def _forget(self, number: int, settled: Iterable[LeftBehind]) -> None:
        for known in range(self._forgotten + 1, number + 1):
            if (kept := self._kept.pop(known, None)) is not None:
                self._booked_and_forgotten = kept.forwarded
        self._forgotten = max(self._forgotten, number)
        self._journal.forget(number)
        for left in settled:
            if left in self._left:
                self._left.remove(left)
                for path in left.paths:
                    path.unlink(missing_ok=True)

    async def _of(self, epoch: str) -> tuple[int, int]:
        """Postings that Redis has applied of an epoch, and the samples forwarded in them."""
        fields = await self.store.command("HMGET", f"{LEDGER_PREFIX}epochs", epoch, f"{epoch}\tforwarded")
        applied, forwarded = (int(value or 0) for value in fields)
        return applied, forwarded
