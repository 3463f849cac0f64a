"""Which replicas are live: each says so in the ledger's Redis every second, and is told of all others in return.

    async with Registry(store, replica) as registry:    from here on students are told of it
        registry.replicas()                             what Describe says; asks nobody
                                                        on leaving it is told of no more, at once

An entry lapses after five seconds, by Redis's clock: replicas need not agree on the time. A Redis that has lost
everything has all of them again a second after it answers, and until it has, nobody is taken for gone.
"""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, Self

from redis.exceptions import ResponseError

from protos import teacher_pb2 as pb
from teacher_server.store import REPLICAS_PREFIX, Store, StoreUnavailable

HEARTBEAT_SECONDS = 1.0
LIVE_SECONDS = 5.0
"""So long after its last heartbeat a replica is told of."""
KEPT_SECONDS = 600.0
"""So long the last list is told of while Redis does not answer: who is gone students find out by themselves, but in the
end somebody else may have an address."""

# Two keys: live, by when they lapse; and about, what is told of each. A heartbeat writes the first alone, since Redis
# keeps every write in its append-only file.
_BEAT = """
local live, about = ARGV[1] .. 'live', ARGV[1] .. 'about'
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, lapsed in ipairs(redis.call('ZRANGEBYSCORE', live, '-inf', now)) do
  redis.call('ZREM', live, lapsed)
  redis.call('HDEL', about, lapsed)
end
for _, ahead in ipairs(redis.call('ZRANGEBYSCORE', live, '(' .. now + ARGV[4], '+inf')) do
  redis.call('ZADD', live, now + ARGV[4], ahead)  -- the clock was set back: it is not to be live for as long
end
local new = redis.call('ZADD', live, now + ARGV[4], ARGV[2])
if redis.call('HGET', about, ARGV[2]) ~= ARGV[3] then
  redis.call('HSET', about, ARGV[2], ARGV[3])
end
return {new, redis.call('HVALS', about)}
"""
_LEAVE = """
if redis.call('HGET', ARGV[1] .. 'about', ARGV[2]) == ARGV[3] then  -- else another process has the address by now
  redis.call('ZREM', ARGV[1] .. 'live', ARGV[2])
  redis.call('HDEL', ARGV[1] .. 'about', ARGV[2])
end
"""
_ADDRESS = re.compile(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):[1-9]\d{0,4}")  # a gRPC target may be much else
_log = logging.getLogger(__name__)


class Registry:
    """One replica's place among those that share its ledger. For the event loop's thread."""

    def __init__(
        self, store: Store, replica: pb.Replica, reach: str = "", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`reach`: within which network the replica's address means it (addresses.py); "" for everywhere."""
        self.address = replica.address
        self._store, self._clock = store, clock
        self._replica = replica
        self._reach = reach
        self._member = f"{replica.address} {reach}".strip()
        self._about = json.dumps(
            {
                "address": replica.address,
                "teacher": replica.teacher,
                "fingerprint": replica.fingerprint,
                "reach": reach,
                "run": secrets.token_hex(8),
            }
        )
        self._others: dict[str, pb.Replica] = {}
        self._complete_at = 0.0
        """When all have had time to come back to a Redis that had forgotten this one."""
        self._unread = False
        self._heard = clock()
        self._registered = False
        self._failing = False
        self._task: asyncio.Task[NoReturn] | None = None

    async def __aenter__(self) -> Self:
        await self._beat()
        self._registered = True
        self._task = asyncio.create_task(self._beat_forever(), name="registry")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._registered = False
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        try:
            await self._store.script(_LEAVE, REPLICAS_PREFIX, self._member, self._about)
        except (StoreUnavailable, ResponseError) as error:
            _log.warning("replicas: told of for another %g s at most, since %s", LIVE_SECONDS, error)

    def replicas(self) -> list[pb.Replica]:
        """Live replicas by address, of any teacher, this one among them while it is registered."""
        known = dict(self._others) if self._clock() - self._heard < KEPT_SECONDS else {}
        if self._registered:
            known[self.address] = self._replica
        return [known[address] for address in sorted(known)]

    def alike(self) -> int:
        """How many of these have this one's fingerprint."""
        return sum(replica.fingerprint == self._replica.fingerprint for replica in self.replicas())

    async def _beat_forever(self) -> NoReturn:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            await self._beat()

    async def _beat(self) -> None:
        ttl = int(1000 * LIVE_SECONDS)
        try:
            new, found = await self._store.script(_BEAT, REPLICAS_PREFIX, self._member, self._about, ttl)
        except (StoreUnavailable, ResponseError) as error:  # gone, or full, or read-only: it serves all the same
            if not self._failing:
                _log.warning("replicas: told of no more once its entry lapses, since %s", error)
            self._failing = True
            return
        if self._failing:
            _log.info("replicas: told of again")
        self._failing = False
        self._heard = now = self._clock()
        # Another machine's loopback is somebody else's port here; and whoever asks an address that all can reach may
        # be anywhere.
        others = {
            replica.address: replica
            for replica, reach in filter(None, map(self._read, found))
            if reach in {"", self._reach} and replica.address != self.address
        }
        if new and self._registered:
            self._complete_at = now + LIVE_SECONDS
        self._others = others if now >= self._complete_at else self._others | others

    def _read(self, entry: bytes) -> tuple[pb.Replica, str] | None:
        """A replica, and its reach; None for what none of ours wrote, which is no reason to tell of nobody."""
        with suppress(ValueError, TypeError, KeyError):
            about = json.loads(entry)
            replica = pb.Replica(**{field: about[field] for field in ("address", "teacher", "fingerprint")})
            if _ADDRESS.fullmatch(replica.address):
                return replica, about["reach"]
        if not self._unread:
            _log.warning("replicas: Redis has an entry that is none, %.200r; such are left out", entry)
        self._unread = True
        return None
