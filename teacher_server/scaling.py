"""How many replicas there should be, by how long queries wait for the device. Knows no cluster.

Queries wait longer the nearer the devices are to all that they can do, and without bound beyond it, so a target for the
mean wait is a target for what is left of them. What a replica less would do to it, its device's idle time says.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

_BUSY_SHARE = 0.7
"""What the remaining devices may be busy, at most, for one to be given up."""


class Load(NamedTuple):
    """What one replica says of itself: three counts since it began, and how things stand."""

    queries: int
    """That have left the queue for the device."""
    queue_seconds: float
    """For which these waited, in all."""
    busy_seconds: float
    """Of the device."""
    waiting: int
    """Samples in the queue now."""


class Moment(NamedTuple):
    """All replicas that serve, over a short time."""

    seconds: float
    queries: int
    """That left a queue."""
    queue_seconds: float
    """For which these had waited, in all."""
    busy_seconds: float
    """Of all devices."""
    waiting: int
    """Samples in queues at its end."""


@dataclass(frozen=True)
class Policy:
    minimum: int
    maximum: int
    target_seconds: float
    """Of waiting in the queue, on average over `up_seconds`; beyond it there should be more."""
    down_seconds: float
    """For which there must be half of that at most before one is given up."""
    up_seconds: float = 5.0


def moment(seconds: float, loads: Sequence[tuple[Load, Load]]) -> Moment:
    """Of the loads (before, now) of each replica, `seconds` apart."""
    queries, queue_seconds, busy = (
        sum(now[field] - before[field] for before, now in loads) for field in range(len(Load._fields) - 1)
    )
    return Moment(seconds, int(queries), queue_seconds, busy, sum(now.waiting for _, now in loads))


def queue_seconds(moments: Sequence[Moment]) -> float:
    """The mean wait; infinite where some wait all the time and none leaves the queue."""
    queries = sum(moment.queries for moment in moments)
    if not queries:
        return math.inf if moments and all(moment.waiting for moment in moments) else 0.0
    return sum(moment.queue_seconds for moment in moments) / queries


def wanted(present: int, serving: int, moments: Sequence[Moment], policy: Policy) -> int:
    """How many there should be, of which `present` were wanted so far and `serving` are ready.

    moments: one after another, of the time in which as many served; none is older than the last change.
    """
    lately = _last(moments, policy.up_seconds)
    if lately and queue_seconds(lately) > policy.target_seconds:
        # By half more at a time, and only once those that were asked for before have come and been seen to be too few.
        return min(policy.maximum, serving + math.ceil(serving / 2)) if present <= serving else present
    calm = _last(moments, policy.down_seconds)
    if calm and present > policy.minimum and queue_seconds(calm) <= policy.target_seconds / 2:
        seconds = sum(moment.seconds for moment in calm)
        if sum(moment.busy_seconds for moment in calm) / seconds <= _BUSY_SHARE * (present - 1):
            return present - 1
    return present


def _last(moments: Sequence[Moment], seconds: float) -> Sequence[Moment]:
    """The last moments that make up so many seconds; none where all of them do not."""
    for count, span in enumerate(accumulate(moment.seconds for moment in reversed(moments)), 1):
        if span >= seconds:
            return moments[len(moments) - count :]
    return ()
