"""Who waits for which samples of which computation. No tasks and no input or output here; flights.py has the flow.

    Query     what is asked            Waiter    a query while it waits
    Flight    samples that one query brought and nobody else was on; others join some of them
    Share     which of a flight's samples a waiter wants, and where they go in its answer
    Leg       samples of a flight on their way through the batcher, at the charge of one waiter, their host

Rows are places in a flight, positions are places in a query.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protos import teacher_pb2 as pb
from teacher_server.auth import Caller
from teacher_server.postings import Request
from teacher_server.purses import Hold
from teacher_server.queues import Array, Computed
from teacher_server.trails import Passage, Trail

Logits = NDArray[np.float32]
Places = NDArray[np.intp]
Rows = slice | Places

ALL = slice(None)


def _nothing() -> None:
    pass


@dataclass(frozen=True, eq=False)
class Query:
    """n samples that a caller wants answers to."""

    caller: Caller
    inputs: Mapping[str, Array]
    """[n, ...] each, unchanged until answered."""
    keys: list[bytes] | None
    """Where their answers are cached; None: computed afresh, for this query alone, and not cached."""
    writes: bool = True
    """Whether what is computed is cached."""
    request: Request | None = None
    """Its request id, if it has one."""
    accepted: Callable[[], None] = _nothing
    """Called once, when all of it is under way for others, what it lacks waits for its turn, or it has its answers:
    refused attempts do not count."""
    unasked: int = 0
    """Samples from which the student chose these, without these."""
    trail: Trail = field(default_factory=Trail)
    """Of the call that asks."""

    @property
    def samples(self) -> int:
        return len(next(iter(self.inputs.values())))


class Outcome(NamedTuple):
    logits: Logits
    """[n, classes], finite."""
    sources: NDArray[np.uint8]
    """[n], as pb.Source."""
    charged: int
    """Samples that this query pays for; those computed, but for a replayed one."""
    device_nanoseconds: int
    """Of the charged ones."""

    def count(self, source: pb.Source) -> int:
        return int(np.count_nonzero(self.sources == source))


class Waiter:
    """A query from its call to its answer. `done` is set when all is there, or `error` says why it never will be."""

    def __init__(self, query: Query, done: asyncio.Future[None]) -> None:
        self.caller, self.request, self.writes, self.done = query.caller, query.request, query.writes, done
        self.trail = query.trail
        self.replayed = query.request is not None and query.request.replayed
        self.flights: list[Flight] = []
        self.error: Exception | None = None
        self.charged = 0
        self.device_nanoseconds = 0
        self.sources = np.zeros(query.samples, np.uint8)
        self._logits: Logits | None = None
        self._missing = query.samples
        self._accepted = query.accepted

    def accept(self) -> None:
        self._accepted()
        self._accepted = _nothing

    def take(self, positions: Rows, logits: Logits, sources: int | NDArray[np.uint8]) -> None:
        """Files answers; every position comes once."""
        if len(logits) == len(self.sources):
            self._logits = logits if isinstance(positions, slice) else None
        if self._logits is None:
            self._logits = np.empty((len(self.sources), logits.shape[1]), np.float32)
        if self._logits is not logits:
            self._logits[positions] = logits
        self.sources[positions] = sources
        self._missing -= len(logits)
        if not self._missing:
            self.wake()

    def wake(self) -> None:
        if not self.done.done():  # cancelled, when its caller has just gone
            self.done.set_result(None)

    def outcome(self) -> Outcome:
        """Raises `error`, if any."""
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        if self._logits is None or self._missing:
            raise RuntimeError("asked for before all was there")
        return Outcome(self._logits, self.sources, self.charged, self.device_nanoseconds)


class Share(NamedTuple):
    rows: Places
    positions: Places

    def among(self, rows: Rows, samples: int) -> tuple[Places, Places]:
        """Which of this share's entries are among `rows` of a flight of so many samples, and where in `rows`."""
        place = np.full(samples, -1)
        place[rows] = np.arange(len(place[rows]))
        there = place[self.rows]
        return np.flatnonzero(there >= 0), there[there >= 0]


class Flight:
    """`keys` is None for one that nobody else can join."""

    def __init__(self, keys: list[bytes] | None, samples: int) -> None:
        self.keys = keys
        self.samples = samples
        self.writes = np.zeros(samples, np.bool_)  # rows whose answers are to be cached, for one at least
        self.shares: dict[Waiter, Share | None] = {}  # the oldest first; None: all rows, in order
        self.legs: set[Leg] = set()
        self.passage = Passage(samples)
        self.corrupt = np.empty(0, np.intp)  # rows whose cache entry must be overwritten
        self._rows: dict[bytes, int] = {}
        self._landed = np.empty(0, np.bool_)  # rows computed and kept for who joins until they can be read in the cache
        self._logits: Logits | None = None

    def row(self, key: bytes) -> int:
        if not self._rows and self.keys is not None:
            self._rows = {key: row for row, key in enumerate(self.keys)}
        return self._rows[key]

    def join(self, waiter: Waiter, share: Share | None) -> None:
        """Gives it at once what has been computed already."""
        self.shares[waiter] = share
        waiter.flights.append(self)
        waiter.trail.passages.append(self.passage)
        if waiter.writes:
            self.writes[ALL if share is None else share.rows] = True
        if share is not None and self._logits is not None:
            landed = self._landed[share.rows]
            if landed.any():
                waiter.take(share.positions[landed], self._logits[share.rows[landed]], pb.SOURCE_COALESCED)

    def keep(self, rows: Rows, logits: Logits) -> None:
        """For those who join from here on."""
        if self._logits is None:
            self._landed = np.zeros(self.samples, np.bool_)
            self._logits = np.empty((self.samples, logits.shape[1]), np.float32)
        self._landed[rows], self._logits[rows] = True, logits

    def deliver(self, rows: Rows, logits: Logits, payer: Waiter | None) -> None:
        """Computed answers to all who want them: COMPUTED for who pays, the first time, and COALESCED for the rest."""
        for waiter, share in self.shares.items():
            if share is None:
                waiter.take(rows, logits, pb.SOURCE_COMPUTED if waiter is payer else pb.SOURCE_COALESCED)
                continue
            entries, where = share.among(rows, self.samples)
            if len(entries):
                sources = np.full(len(entries), pb.SOURCE_COALESCED, np.uint8)
                if waiter is payer:
                    sources[np.unique(where, return_index=True)[1]] = pb.SOURCE_COMPUTED
                waiter.take(share.positions[entries], logits[where], sources)

    def deliver_cached(self, rows: Places, logits: Logits) -> list[tuple[Waiter, int]]:
        """Who was given how many."""
        given = []
        for waiter, share in self.shares.items():
            if share is None:
                waiter.take(rows, logits, pb.SOURCE_CACHED)
                given.append((waiter, len(rows)))
                continue
            entries, where = share.among(rows, self.samples)
            if len(entries):
                waiter.take(share.positions[entries], logits[where], pb.SOURCE_CACHED)
                given.append((waiter, len(entries)))
        return given

    def wanting(self, rows: Rows) -> list[tuple[Waiter, NDArray[np.bool_]]]:
        """Who wants any of `rows`, the oldest first, and which."""
        numbers = np.arange(self.samples)[rows]
        everything = np.ones(len(numbers), np.bool_)
        found = [
            (waiter, everything if share is None else np.isin(numbers, share.rows))
            for waiter, share in self.shares.items()
        ]
        return [(waiter, wanted) for waiter, wanted in found if wanted.any()]

    def positions(self, waiter: Waiter, rows: Rows) -> list[int]:
        """Where the waiter wants `rows`, rising; the first place of one that he wants more than once."""
        numbers = np.arange(self.samples)[rows].tolist()
        if (share := self.shares[waiter]) is None:
            return sorted(numbers)
        first = dict(zip(share.rows[::-1].tolist(), share.positions[::-1].tolist(), strict=True))
        return sorted(first[row] for row in numbers)

    def first_positions(self, rows: Places) -> list[tuple[Waiter, int]]:
        """Who wants any of `rows`, and the first of their positions that does."""
        found = []
        for waiter, share in self.shares.items():
            positions = rows if share is None else share.positions[np.isin(share.rows, rows)]
            if len(positions):
                found.append((waiter, int(positions.min())))
        return found

    def owners(self, rows: Rows) -> list[tuple[Waiter | None, Rows]]:
        """The oldest who wants each of `rows`, or None, and which of them are his, as places in `rows`."""
        oldest = next(iter(self.shares.items()), None)
        if oldest is None or oldest[1] is None:
            return [(oldest[0] if oldest else None, ALL)]
        groups: list[tuple[Waiter | None, Rows]] = []
        left = np.ones(len(np.arange(self.samples)[rows]), np.bool_)
        for waiter, wanted in self.wanting(rows):
            if (his := np.flatnonzero(wanted & left)).size:
                groups.append((waiter, his))
                left[his] = False
        if left.any():
            groups.append((None, np.flatnonzero(left)))
        return groups


class Leg:
    """Samples of a flight that one waiter, the host, has computed at his charge and in his queue."""

    def __init__(self, flight: Flight, host: Waiter, rows: Rows, inputs: Mapping[str, Array]) -> None:
        self.flight, self.host, self.rows, self.inputs = flight, host, rows, inputs
        self.samples = len(next(iter(inputs.values())))
        self.landed = 0
        self.queued = 0
        self.future: Future[Computed] | None = None
        self._hold: Hold | None = None
        self._held = 0

    @property
    def trace_ids(self) -> list[str]:
        """Whose query it is, and of those who wait for the same flight."""
        return list(dict.fromkeys(waiter.trail.mark.trace_id for waiter in (self.host, *self.flight.shares)))

    def rows_of(self, start: int, stop: int) -> Rows:
        """The flight's rows of this leg's samples start to stop."""
        if isinstance(self.rows, slice):
            first = self.rows.start or 0
            return slice(first + start, first + stop)
        return self.rows[start:stop]

    def board(self, hold: Hold | None) -> None:
        self._hold, self._held = hold, self.samples if hold else 0
        self.queued = monotonic_ns()

    def pay(self, samples: int) -> Hold:
        if self._hold is None:
            raise RuntimeError("nothing was held for this leg")
        self._held -= samples
        self._hold.pay(samples)
        return self._hold

    def release(self, samples: int | None = None) -> None:
        """So many of what is held; without a number, all that is left."""
        some = self._held if samples is None else min(samples, self._held)
        if self._hold is not None and some:
            self._held -= some
            self._hold.release(some)

    def end(self) -> None:
        """Nothing more is to come of it: it lets go of what it holds."""
        self.release()
        self.flight.legs.discard(self)
        self.future, self.inputs = None, {}

    def withdrawn(self, kept: int) -> tuple[Rows, dict[str, Array]]:
        """Makes it shorter; what no longer belongs to it."""
        rest = self.rows_of(kept, self.samples), {name: array[kept:] for name, array in self.inputs.items()}
        self.release(self.samples - kept)
        self.samples = kept
        return rest
