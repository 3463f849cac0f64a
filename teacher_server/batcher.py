"""How queries become batches: fair across tenants and jobs, bounded, and no query harmed by another.

    submit -> its job's queue -> turns (queues.py) -> batch -> compute -> Future[Computed]

`compute` is the only seam to the device. It is called from one thread, the batcher's own, and from nowhere else.
Samples are divisible: a query may be spread over several batches, and is put together again in its own order.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Self

import numpy as np

from teacher_server.config import BatcherConfig
from teacher_server.errors import (
    DeviceLost,
    Draining,
    ForwardFailed,
    InvalidQuery,
    PastDeadline,
    QueueFull,
    TeacherServerError,
)
from teacher_server.queues import Answer, Array, Batch, Computed, FairQueue, Query, split
from teacher_server.trails import concern

__all__ = ["Batcher", "Computed", "OnBatch", "split"]

_log = logging.getLogger(__name__)

OnBatch = Callable[[int, list[tuple[object, range]], int, dict[str, Array] | TeacherServerError], None]
"""(number, parts, nanoseconds, outcome) of one forward pass. The number is what `forwarding` returned; a part is a
query's tag and which of its samples were in the batch, one after another; the outcome is {output: [samples, ...]}, or
why there is none: parts of a joint failure come again, each in a batch of its own."""


class Batcher:
    """Takes queries from any thread and answers them through futures. Used as a context manager, which drains.

    compute: {input: [n, ...]} -> {output: [n, ...]}, n <= max_batch_size. What it raises fails a query alone: a batch
    of several is computed again, each query by itself. DeviceLost fails everything and stops the batcher.
    forwarding: called before each forward pass, also a repeated one, with its samples; numbers the pass. Raises
    TeacherServerError where it may not begin, which fails the batch's queries.
    on_batch: called after each forward pass, before any future that it completes or fails is done. Both are called
    from the batcher's own thread; what else they raise stops the batcher.
    on_device_lost: called once, when no batch will be computed any more; everything waiting has failed by then.
    clock: seconds, for delays and deadlines. busy_clock: nanoseconds, for the device's busy time; give it the
    engine's own counter, and the times on all bills add up to that counter.

    Whatever is logged on the way of a batch names the `trace_ids` of its queries' tags, where they have some.
    """

    def __init__(
        self,
        config: BatcherConfig,
        compute: Callable[[dict[str, Array]], dict[str, Array]],
        *,
        forwarding: Callable[[int], int] = lambda _samples: 0,
        on_batch: OnBatch = lambda _number, _parts, _nanoseconds, _outcome: None,
        on_device_lost: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        busy_clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._config = config
        self._compute = compute
        self._forwarding = forwarding
        self._on_batch = on_batch
        self._on_device_lost = on_device_lost
        self._clock = clock
        self._busy_clock = busy_clock
        self._closed = False
        self._delay = config.max_queue_delay_microseconds / 1e6
        self._queue = FairQueue(turn=config.max_batch_size)
        self._changed = threading.Condition()  # guards all that follows, and the queue
        self._draining = False
        self._lost: str | None = None
        self._samples_per_second = 0.0
        # A daemon, so that a device that never returns cannot keep the process alive once close() has given up.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._closed:
            self.close()

    def drain(self) -> None:
        """From here on submit raises Draining; what is queued is computed without further delay. Returns at once."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> bool:
        """Drains and waits. After `timeout` seconds the rest fails with Draining, and the answer is False."""
        self.drain()
        self._closed = True
        if self._thread.is_alive():
            self._thread.join(timeout)
        with self._changed:
            rest = list(self._queue.queries)
        for query in rest:
            self._settle(query, Draining("this replica stopped before the query's turn came; ask another one"))
        return not rest and not self._thread.is_alive()

    def depth(self) -> dict[tuple[str, str], int]:
        """Samples waiting, by (tenant, job); those being computed are not waiting."""
        with self._changed:
            return self._queue.depth()

    def fullest(self) -> float:
        """Which part of its bound, in samples or bytes, the fullest queue of a job or tenant has taken: 0 to 1."""
        with self._changed:
            (job_samples, job_bytes), (tenant_samples, tenant_bytes) = self._queue.largest()
        bounds = self._config
        return max(
            job_samples / bounds.max_queue_size,
            job_bytes / bounds.max_queue_bytes,
            tenant_samples / bounds.max_tenant_queue_size,
            tenant_bytes / bounds.max_tenant_queue_bytes,
        )

    def submit(
        self,
        tenant: str,
        job: str,
        inputs: Mapping[str, Array],
        deadline: float | None = None,
        *,
        tag: object = None,
    ) -> Future[Computed]:
        """Queues n > 0 samples, `inputs` being [n, ...] each, unchanged until answered. `deadline` is clock() time.

        Cancelling the future drops what has not been dispatched yet. It fails with PastDeadline, ForwardFailed,
        DeviceLost or Draining. `tag` is what on_batch knows the query by. Raises QueueFull; InvalidQuery where the
        query alone is beyond the bounds; Draining or DeviceLost where nothing is taken any more.
        """
        query = Query(tenant, job, inputs, self._clock(), deadline, tag)
        with self._changed:
            if self._lost is not None:
                raise DeviceLost(self._lost)
            if self._draining:
                raise Draining("this replica is going away; ask another one")
            self._check_room(query)
            self._queue.add(query)
            self._changed.notify_all()
        # Weakly: a query that holds its future that holds the query would keep the samples until the next collection.
        weak = query.future.query

        def ended(_: Future[Computed]) -> None:
            if (waiting := weak()) is not None:
                self._settle(waiting, None)

        query.future.add_done_callback(ended)
        return query.future

    def withdraw(self, future: Future[Computed]) -> int:
        """Takes back what waits of a query of `submit`'s: how many of its samples stay, dispatched, the first ones.

        Their answers alone come through the future, which is cancelled where none stay. Nothing can be taken back
        from a query that is done.
        """
        if not isinstance(future, Answer):
            raise TypeError("withdraw takes a future that submit returned")
        query = future.query()
        with self._changed:
            if query is None or query.settled:
                return future.samples
            self._queue.remove(query)
            query.samples = dispatched = query.taken
            complete = query.answered == dispatched
        if not dispatched:
            future.cancel()
        elif complete:
            self._settle(query, query.computed(self._clock()))
        return dispatched

    def _check_room(self, query: Query) -> None:
        samples, size = query.samples, query.samples * query.sample_bytes
        job, tenant = f"job {query.job!r} of tenant {query.tenant!r}", f"tenant {query.tenant!r}"
        job_samples, job_bytes = self._queue.waiting(query.tenant, query.job)
        tenant_samples, tenant_bytes = self._queue.waiting(query.tenant)
        for owner, waiting, more, unit, knob in (
            (job, job_samples, samples, "samples", "max_queue_size"),
            (job, job_bytes, size, "bytes", "max_queue_bytes"),
            (tenant, tenant_samples, samples, "samples", "max_tenant_queue_size"),
            (tenant, tenant_bytes, size, "bytes", "max_tenant_queue_bytes"),
        ):
            bound: int = getattr(self._config, knob)
            flag = "--" + knob.replace("_", "-")
            if more > bound:  # never retried: it would not fit an empty queue either
                raise InvalidQuery(
                    f"inputs: {more} {unit} in one query, but {owner} may have at most {bound} waiting ({flag}); send "
                    "smaller queries"
                )
            if waiting + more > bound:
                over = (waiting + more - bound) / (1 if unit == "samples" else query.sample_bytes)
                seconds = self._seconds_for(over, query.tenant)
                raise QueueFull(
                    f"the queue of {owner} is full: {waiting} of {bound} {unit} wait ({flag}), and this query has "
                    f"{more}; ask again in {seconds:.2g} s",
                    seconds,
                )

    def _seconds_for(self, samples: float, tenant: str) -> float:
        """How long this many samples of one of the tenant's jobs take, at the speed of late; 1 s while unknown."""
        speed = self._samples_per_second * self._queue.share(tenant)
        return min(max(samples / speed, 0.01), 60.0) if speed else 1.0

    def _settle(self, query: Query, outcome: Computed | TeacherServerError | None) -> None:
        """Ends a query, the first time that anyone asks for it; None where its future is done already."""
        with self._changed:
            first, query.settled = not query.settled, True
            if first:
                self._queue.remove(query)
        # A future stays pending, and so can be cancelled, to the end; this call makes the last race safe.
        if not first or not query.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, TeacherServerError):
            query.future.set_exception(outcome)
        elif outcome is not None:
            query.future.set_result(outcome)

    # What follows runs in the batcher's own thread.

    def _run(self) -> None:
        batch: Batch = {}
        try:
            while batch := self._next_batch():
                self._answer(batch)
                concern()
                batch = {}  # while this thread waits, nothing is kept
        except BaseException as error:  # noqa: BLE001 - no future may stay pending, whatever ended this thread
            if isinstance(error, DeviceLost):
                reason = str(error)
            else:
                reason = f"the batcher stopped on {type(error).__name__}: {error}"
            _log.critical("no batch is computed any more: %s", reason, exc_info=error)
            with self._changed:
                self._lost = reason
                rest = [*batch, *self._queue.queries]
            for query in rest:
                self._settle(query, DeviceLost(reason))
            self._on_device_lost()

    def _next_batch(self) -> Batch:
        """Waits for work. Empty once drained."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue.queries or self._draining)
                now = self._clock()
                late = [query for query in self._queue.queries if query.deadline is not None and query.deadline <= now]
                if not late:
                    patience = self._patience(now)
                    if patience <= 0:
                        return self._queue.take(self._config.max_batch_size)
                    self._changed.wait(patience)
            for query in late:
                waited = now - query.submitted
                self._settle(query, PastDeadline(f"the deadline passed after {waited:.3g} s of waiting, uncomputed"))

    def _patience(self, now: float) -> float:
        """Seconds for which it is worth waiting for more samples, at most until a deadline passes."""
        if not self._delay or self._draining or self._queue.samples >= self._config.max_batch_size:
            return 0.0
        oldest = next(iter(self._queue.queries))
        ends = [oldest.submitted + self._delay, *(q.deadline for q in self._queue.queries if q.deadline is not None)]
        return min(min(ends) - now, threading.TIMEOUT_MAX)

    def _answer(self, batch: Batch) -> None:
        """Computes a batch and settles the queries that it completes, or each alone where it fails."""
        concern(*[query.tag for query in batch])
        sizes = [len(span) for span in batch.values()]
        samples = sum(sizes)
        try:
            number = self._forwarding(samples)
        except TeacherServerError as error:  # what cannot be accounted for is not computed
            for query in batch:
                self._settle(query, error)
            return
        started, busy = self._clock(), self._busy_clock()
        outputs = self._attempt(batch, samples)
        nanoseconds, seconds = self._busy_clock() - busy, self._clock() - started
        for query in batch:
            query.compute_seconds += seconds
        self._on_batch(number, [(query.tag, span) for query, span in batch.items()], nanoseconds, outputs)
        if not isinstance(outputs, dict):
            self._blame(batch, outputs)
            return
        if nanoseconds > 0:
            speed = samples / nanoseconds * 1e9
            self._samples_per_second += (speed - self._samples_per_second) * (0.2 if self._samples_per_second else 1)
        row = 0
        for (query, span), share in zip(batch.items(), split(nanoseconds, sizes), strict=True):
            stop = row + len(span)
            query.device_nanoseconds += share
            with self._changed:  # against withdraw, which makes a query shorter
                query.keep({name: array[row:stop] for name, array in outputs.items()}, span)
                complete = query.answered == query.samples
            if complete:
                self._settle(query, query.computed(self._clock()))
            row = stop

    def _attempt(self, batch: Batch, samples: int) -> dict[str, Array] | TeacherServerError:
        parts = [
            {name: array[span.start : span.stop] for name, array in query.inputs.items()}
            for query, span in batch.items()
        ]
        try:
            joined = parts[0]
            if len(parts) > 1:
                joined = {name: np.concatenate([part[name] for part in parts]) for name in joined}
            outputs = self._compute(joined)
        except TeacherServerError as error:
            return error
        except BaseException as error:  # noqa: BLE001 - even a network that calls sys.exit fails nobody but its query
            if len(batch) == 1:  # of several, the guilty ones will fail once more, by themselves
                query = next(iter(batch))
                _log.warning("a query of job %r of tenant %r failed", query.job, query.tenant, exc_info=error)
            return ForwardFailed(f"the teacher's forward pass raised {type(error).__name__}: {error}")
        for name, array in outputs.items():
            if len(array) != samples:
                said = f"{name}: the teacher answered {samples} samples with {len(array)} rows"
                _log.warning("%s", said)
                return ForwardFailed(said)
        return outputs

    def _blame(self, batch: Batch, error: TeacherServerError) -> None:
        if isinstance(error, DeviceLost):
            raise error
        if len(batch) == 1:
            self._settle(next(iter(batch)), error)
            return
        for query, span in batch.items():
            if not query.settled:
                self._answer({query: span})
