"""Answers by sample, in Redis: what was computed for one student is there for all.

One entry a sample, below the batch: whatever batches a sample comes in, it is found. An entry is a version byte, the
engine's own output (float32 logits, little-endian), and a checksum over its key and these; what is not exactly that
counts as an error, is computed anew and overwritten. The first answer written stays until its time is over, so that
all who read it read the same bits. Nothing here fails a query: without Redis every lookup is a miss.

Memory: Redis's maxmemory bounds it, and beyond that Redis drops the answers asked for least recently (allkeys-lru).
A job whose samples never come again would push out everybody's, so each job has an account of *unread* bytes: those
that it wrote less those that it was given from the cache, never below 0, and forgotten at such a pace that none is left
after an entry's lifetime. A job whose account would exceed its share of the memory (--cache-job-share) writes nothing;
it still reads. Accounts go by the names that jobs give themselves: they are against accidents, not against malice.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, Self, TypeVar

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from redis.exceptions import ResponseError

from teacher_server.auth import Caller
from teacher_server.config import CacheConfig
from teacher_server.metrics import Metrics
from teacher_server.store import CACHE_PREFIX, Store, StoreUnavailable

Logits = NDArray[np.float32]
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_VERSION = b"\x01"
_CHECKSUM_BYTES = 8
_ENTRY_OVERHEAD_BYTES = 80  # what Valkey 9 takes beside key and value: 69 at 10 classes, 81 at 100
# Of one MGET or script: others' commands get their turn, and replies not yet read take room from the entries (Redis
# counts both against maxmemory).
_PIECE_BYTES = 2**20
_BACKLOG_BYTES = 64 * 2**20
_MAX_ACCOUNTS = 10_000
# Looking through this many bytes takes about as long as handing the work to a thread does; and looking at one sample,
# however small, as long as through so many.
_INLINE_BYTES = 512 * 1024
SAMPLE_BYTES = 1024

# ARGV: "NX" or "", seconds to live, then key and value in turn. Replies how many were there already.
_WRITE = """
local refused = 0
for i = 3, #ARGV, 2 do
  if ARGV[1] == 'NX' then
    if not redis.call('SET', ARGV[i], ARGV[i + 1], 'EX', ARGV[2], 'NX') then refused = refused + 1 end
  else
    redis.call('SET', ARGV[i], ARGV[i + 1], 'EX', ARGV[2])
  end
end
return refused
"""

_log = logging.getLogger(__name__)


class Found(NamedTuple):
    rows: NDArray[np.intp]
    """Which of the keys were found, rising."""
    logits: Logits
    """[len(rows), classes]"""
    corrupt: NDArray[np.intp]
    """Which had an entry that is none, rising."""


class AnswerCache:
    """The cache of one teacher's answers. `async with` finishes what is being written. For the event loop's thread."""

    def __init__(
        self,
        store: Store,
        config: CacheConfig,
        classes: int,
        metrics: Metrics,
        *,
        capacity: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """capacity: bytes of the cache's Redis, which jobs have shares of; None where it has no bound."""
        self._store = store
        self._config = config
        self._classes = classes
        self._metrics = metrics
        self._share = None if capacity is None else capacity * config.cache_job_share
        self._clock = clock
        self._value_bytes = len(_VERSION) + 4 * classes + _CHECKSUM_BYTES
        self._accounts: OrderedDict[Caller, tuple[float, float]] = OrderedDict()  # unread bytes, at what time
        self._backlog = 0
        self._refusals: dict[str, str] = {}  # the last ones, as they were logged
        self._writing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._writing:
            await asyncio.wait(self._writing)

    def keys(self, caller: Caller, namespace: str, samples: Sequence[bytes]) -> list[bytes]:
        """Where the answers to samples of these keys are, for this caller. A namespace, if any, is its tenant's own.

        No two scopes meet: a tenant's name has no colon, and the last 16 bytes are the sample's.
        """
        if namespace:
            scope = f"n:{caller.tenant}:{namespace}:"
        else:
            scope = "s:" if self._config.cache_scope == "shared" else f"t:{caller.tenant}:"
        prefix = (CACHE_PREFIX + scope).encode()
        return [prefix + key for key in samples]

    async def get(self, keys: Sequence[bytes]) -> Found:
        """What there is under keys of `keys`'; never raises for want of Redis."""
        try:
            at_once = max(1, _PIECE_BYTES // self._value_bytes)
            values: list[bytes | None] = []
            for start in range(0, len(keys), at_once):
                values += await self._store.command("MGET", *keys[start : start + at_once])
            self._refusals.pop("read", None)
        except (StoreUnavailable, ResponseError) as error:
            self._failed("read", len(keys), error)
            values = [None] * len(keys)
        found = await beside_the_loop(len(keys) * (SAMPLE_BYTES + self._value_bytes), self._decode, keys, values)
        self._metrics.cache_hits.inc(len(found.rows))
        self._metrics.cache_misses.inc(len(keys) - len(found.rows))
        if len(found.corrupt):
            self._metrics.cache_errors.labels("corrupt").inc(len(found.corrupt))
            _log.warning("%d corrupt entries, the first at %r", len(found.corrupt), keys[found.corrupt[0]])
        return found

    def put(
        self,
        caller: Caller,
        keys: Sequence[bytes],
        logits: Logits,
        written: Callable[[], None],
        *,
        overwrite: bool = False,
    ) -> bool:
        """Writes answers [len(keys), classes] that the caller's query computed, and returns before it has.

        True: `written` will be called once they can be read, or could not be written. False: they are not kept.
        `overwrite` replaces what is there; otherwise the first answer stays.
        """
        size = len(keys) * self._entry_bytes(keys)
        if self._backlog + size > _BACKLOG_BYTES:
            self._metrics.cache_errors.labels("dropped").inc(len(keys))
            return False
        if not self._may_write(caller, size):
            self._metrics.cache_declined.inc(len(keys))
            return False
        self._backlog += size
        task = asyncio.get_running_loop().create_task(self._write(caller, keys, logits, written, overwrite=overwrite))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return True

    def used(self, caller: Caller, keys: Sequence[bytes], samples: int) -> None:
        """The caller was given so many answers from the cache; `keys` are like theirs."""
        if caller in self._accounts:
            self._credit(caller, samples * self._entry_bytes(keys))

    # ------------------------------------------------------------ entries

    def _decode(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> Found:
        rows, corrupt, payloads = [], [], []
        for row, value in enumerate(values):
            if value is None:
                continue
            content, checksum = value[:-_CHECKSUM_BYTES], value[-_CHECKSUM_BYTES:]
            if (
                len(value) == self._value_bytes
                and content[:1] == _VERSION
                and _checksum(keys[row], content) == checksum
            ):
                rows.append(row)
                payloads.append(content[1:])
            else:
                corrupt.append(row)
        logits = np.empty((len(rows), self._classes), np.float32)
        if rows:
            logits[:] = np.frombuffer(b"".join(payloads), "<f4").reshape(len(rows), self._classes)
        finite, found = np.isfinite(logits).all(axis=1), np.array(rows, np.intp)
        if not finite.all():
            corrupt = sorted([*corrupt, *found[~finite].tolist()])
            found, logits = found[finite], logits[finite]
        return Found(found, logits, np.array(corrupt, np.intp))

    def _encode(self, keys: Sequence[bytes], logits: Logits) -> list[bytes]:
        """Key and value in turn."""
        data, size = np.ascontiguousarray(logits, "<f4").tobytes(), 4 * self._classes
        parts = []
        for row, key in enumerate(keys):
            content = _VERSION + data[row * size : (row + 1) * size]
            parts += [key, content + _checksum(key, content)]
        return parts

    async def _write(
        self, caller: Caller, keys: Sequence[bytes], logits: Logits, written: Callable[[], None], *, overwrite: bool
    ) -> None:
        entry = self._entry_bytes(keys)
        lost = 0
        try:
            parts = await beside_the_loop(len(keys) * (SAMPLE_BYTES + entry), self._encode, keys, logits)
            at_once = 2 * max(1, _PIECE_BYTES // entry)
            how, seconds = "" if overwrite else "NX", self._config.cache_ttl_seconds
            for start in range(0, len(parts), at_once):
                some = parts[start : start + at_once]
                try:
                    refused = await self._store.script(_WRITE, how, seconds, *some)
                    self._refusals.pop("written", None)
                    self._metrics.duplicates.inc(refused)
                    lost += refused
                except (StoreUnavailable, ResponseError) as error:
                    self._failed("written", len(some) // 2, error)
                    lost += len(some) // 2
        finally:
            self._backlog -= len(keys) * entry
            self._credit(caller, lost * entry)
            written()

    def _failed(self, what: str, samples: int, error: StoreUnavailable | ResponseError) -> None:
        if isinstance(error, StoreUnavailable):  # which the store has logged, once
            self._metrics.cache_errors.labels("unavailable").inc(samples)
        else:
            self._metrics.cache_errors.labels("refused").inc(samples)
            if self._refusals.get(what) != str(error):  # a full Redis refuses every query's
                self._refusals[what] = str(error)
                _log.warning("answers cannot be %s: %s", what, error)

    # ------------------------------------------------------------ shares

    def _entry_bytes(self, keys: Sequence[bytes]) -> int:
        return len(keys[0]) + self._value_bytes + _ENTRY_OVERHEAD_BYTES

    def _may_write(self, caller: Caller, size: int) -> bool:
        if self._share is None:
            return True
        unread = self._unread(caller) + size
        if unread > self._share:
            return False
        self._note(caller, unread)
        return True

    def _credit(self, caller: Caller, size: int) -> None:
        if self._share is not None and size:
            self._note(caller, max(0.0, self._unread(caller) - size))

    def _unread(self, caller: Caller) -> float:
        """The account as it stands now."""
        unread, at = self._accounts.get(caller, (0.0, 0.0))
        pace = (self._share or 0.0) / self._config.cache_ttl_seconds
        return max(0.0, unread - (self._clock() - at) * pace)

    def _note(self, caller: Caller, unread: float) -> None:
        self._accounts[caller] = unread, self._clock()
        self._accounts.move_to_end(caller)
        if len(self._accounts) > _MAX_ACCOUNTS:
            self._accounts.popitem(last=False)


def _checksum(key: bytes, content: bytes) -> bytes:
    return blake3(key + content).digest(length=_CHECKSUM_BYTES)


async def beside_the_loop(
    size: int, work: Callable[_Parameters, _Result], *args: _Parameters.args, **kwargs: _Parameters.kwargs
) -> _Result:
    """Does work whose time grows with `size` bytes; where they are many, in a thread, so that no other caller waits."""
    if size <= _INLINE_BYTES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
