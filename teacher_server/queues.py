"""Who is next: deficit round robin over tenants and over the jobs of each, counted in samples. No threads here.

A turn is one full batch. Longer turns would make a small query wait longer behind a greedy neighbour; shorter ones
would cut queries of about a batch into pieces, so that all of them finish late together.
"""

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


def split(nanoseconds: int, samples: Sequence[int]) -> list[int]:
    """Device time by parts of a batch: whole nanoseconds that add up exactly."""
    total, row, parts = sum(samples), 0, []
    for count in samples:
        # Differences of one rounded running total.
        parts.append(nanoseconds * (row + count) // total - nanoseconds * row // total)
        row += count
    return parts


@dataclass(frozen=True)
class Computed:
    """What became of one query of n samples."""

    outputs: dict[str, Array]
    """[n, ...] each, in the order of the query's samples; of a query withdrawn half-way, the first n of them."""
    device_nanoseconds: int
    """Its share of the busy time of the batches that it was answered in; shares add up to that time exactly."""
    queue_seconds: float
    """Waiting, also between its parts; with compute_seconds, all the time from submit to answer."""
    compute_seconds: float
    """Wall time of the batches that it was part of."""


class Answer(Future[Computed]):
    """A query's future, and the way back to the query: weakly, so that neither keeps the other."""

    query: "weakref.ref[Query]"
    samples: int


@dataclass(eq=False)
class Query:
    """One request while it is here. Samples before `taken` have been given to a batch, the others wait."""

    tenant: str
    job: str
    inputs: Mapping[str, Array]
    submitted: float
    deadline: float | None
    tag: object = None
    future: Answer = field(default_factory=Answer)
    taken: int = 0
    answered: int = 0
    settled: bool = False
    outputs: dict[str, Array] = field(default_factory=dict)
    device_nanoseconds: int = 0
    compute_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.samples = len(next(iter(self.inputs.values())))
        self.sample_bytes = sum(array.nbytes for array in self.inputs.values()) // self.samples
        # Queries share a batch only where their samples can be joined into one array.
        self.kind = sorted((name, array.dtype.str, array.shape[1:]) for name, array in self.inputs.items())
        self.future.query, self.future.samples = weakref.ref(self), self.samples

    def keep(self, outputs: Mapping[str, Array], span: range) -> None:
        """Files the answers of samples `span`; parts come in order."""
        for name, array in outputs.items():
            if len(span) == self.samples:
                self.outputs[name] = array
                continue
            if name not in self.outputs:
                self.outputs[name] = np.empty((self.samples, *array.shape[1:]), array.dtype)
            self.outputs[name][span.start : span.stop] = array
        self.answered = span.stop

    def computed(self, now: float) -> Computed:
        """The outcome, once `answered` is `samples`."""
        outputs = {name: array[: self.samples] for name, array in self.outputs.items()}
        queued = max(now - self.submitted - self.compute_seconds, 0.0)
        return Computed(outputs, self.device_nanoseconds, queued, self.compute_seconds)


Batch = dict[Query, range]
"""Which samples of which queries; all queries of one kind."""


class _Source(Protocol):
    @property
    def samples(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def take(self, room: int, batch: Batch) -> int: ...


class _JobQueue:
    """The queries of one job, first come, first served."""

    def __init__(self) -> None:
        self.queries: deque[Query] = deque()
        self.samples = 0
        self.bytes = 0

    def count(self, query: Query, samples: int) -> None:
        self.samples += samples
        self.bytes += samples * query.sample_bytes

    def take(self, room: int, batch: Batch) -> int:
        """Moves up to `room` samples into the batch; none where they cannot be joined with what is in it."""
        taken = 0
        while self.queries and taken < room:
            query = self.queries[0]
            if batch and next(iter(batch)).kind != query.kind:
                break
            n = min(query.samples - query.taken, room - taken)
            start = batch[query].start if query in batch else query.taken
            query.taken += n
            batch[query] = range(start, query.taken)
            if query.taken == query.samples:
                self.queries.popleft()
            self.count(query, -n)
            taken += n
        return taken


_Child = TypeVar("_Child", bound=_Source)


class _Turns(Generic[_Child]):
    """Children in turns of `turn` samples. A turn that a full batch cuts short goes on in the next batch."""

    def __init__(self, turn: int, empty: Callable[[], _Child]) -> None:
        self._turn, self._empty = turn, empty
        self._left: dict[str, int] = {}
        self.children: OrderedDict[str, _Child] = OrderedDict()

    @property
    def samples(self) -> int:
        return sum(child.samples for child in self.children.values())

    @property
    def bytes(self) -> int:
        return sum(child.bytes for child in self.children.values())

    def child(self, name: str) -> _Child:
        if name not in self.children:
            self.children[name], self._left[name] = self._empty(), self._turn
        return self.children[name]

    def prune(self, name: str) -> None:
        """A child with nothing left leaves the round, and its turn lapses."""
        if not self.children[name].samples:
            del self.children[name], self._left[name]

    def take(self, room: int, batch: Batch) -> int:
        taken = 0
        while taken < room:
            # The first in line that has something to give; one whose samples do not fit this batch keeps its place.
            for name, child in self.children.items():
                n = child.take(min(room - taken, self._left[name]), batch)
                if n:
                    break
            else:
                break
            taken += n
            self._left[name] -= n
            if not self._left[name]:
                self._left[name] = self._turn
                self.children.move_to_end(name)
            self.prune(name)
        return taken


class FairQueue:
    """All queries that wait, in the order in which their turns come."""

    def __init__(self, turn: int) -> None:
        self._tenants: _Turns[_Turns[_JobQueue]] = _Turns(turn, lambda: _Turns(turn, _JobQueue))
        self.queries: OrderedDict[Query, None] = OrderedDict()  # by arrival; partly taken ones included

    @property
    def samples(self) -> int:
        return self._tenants.samples

    def waiting(self, tenant: str, job: str | None = None) -> tuple[int, int]:
        """Samples and bytes of a tenant, or of one job."""
        queue: _Source | None = self._tenants.children.get(tenant)
        if isinstance(queue, _Turns) and job is not None:
            queue = queue.children.get(job)
        return (queue.samples, queue.bytes) if queue else (0, 0)

    def share(self, tenant: str) -> float:
        """Which part of the device a job of this tenant gets while all that wait keep waiting."""
        jobs = self._tenants.children.get(tenant)
        return 1 / (max(1, len(self._tenants.children)) * max(1, len(jobs.children) if jobs else 1))

    def depth(self) -> dict[tuple[str, str], int]:
        """Samples waiting, by tenant and job."""
        return {
            (tenant, job): queue.samples
            for tenant, jobs in self._tenants.children.items()
            for job, queue in jobs.children.items()
        }

    def largest(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(samples, bytes) of the job with most of each, and of the tenant with most of each."""
        tenants = list(self._tenants.children.values())
        jobs = [job for tenant in tenants for job in tenant.children.values()]

        def most(queues: Sequence[_Source]) -> tuple[int, int]:
            return max((q.samples for q in queues), default=0), max((q.bytes for q in queues), default=0)

        return most(jobs), most(tenants)

    def add(self, query: Query) -> None:
        queue = self._tenants.child(query.tenant).child(query.job)
        queue.queries.append(query)
        queue.count(query, query.samples)
        self.queries[query] = None

    def remove(self, query: Query) -> None:
        """Drops those samples of a query that still wait, if any."""
        if query not in self.queries:
            return
        del self.queries[query]
        jobs = self._tenants.child(query.tenant)
        queue = jobs.child(query.job)
        queue.queries.remove(query)
        queue.count(query, query.taken - query.samples)
        jobs.prune(query.job)
        self._tenants.prune(query.tenant)

    def take(self, room: int) -> Batch:
        """The next batch, of at most `room` samples."""
        batch: Batch = {}
        self._tenants.take(room, batch)
        for query in batch:
            if query.taken == query.samples:
                del self.queries[query]
        return batch
