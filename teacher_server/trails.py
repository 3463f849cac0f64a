"""Where a call has been: its trace, and moments on its way, from its headers to its reply. Knows no transport.

    Trail      one call; the access log and the spans are made of it when the call has ended
    Passage    what happened to one flight (shares.py), for all whose trails lead through it
    concern    has whatever is logged name the traces concerned, here and in what is begun from here

Moments are those of time.monotonic_ns().
"""

import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from random import SystemRandom
from time import monotonic_ns
from typing import NamedTuple, Protocol

# W3C Trace Context: there is no version ff, and a version after 00 may say more than we understand.
_TRACEPARENT = re.compile(r"(?!ff|00.{54})[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_SAMPLED = 0x01
_random_bits = SystemRandom().getrandbits


class Traced(Protocol):
    @property
    def trace_ids(self) -> Iterable[str]: ...


class Mark(NamedTuple):
    """A span, as W3C Trace Context names it: 32 and 16 hex digits, of which one at least is not 0."""

    trace_id: str
    span_id: str


class Pass(NamedTuple):
    """One forward pass in which samples of a flight were."""

    host: Mark
    """At whose charge."""
    batch: int
    size: int
    """Samples in the batch, of all who were in it."""
    samples: int
    """Those of this flight."""
    hosts: tuple[Mark, ...]
    """All calls at whose charge the batch was."""
    queued: int
    began: int
    ended: int
    settled: int


@dataclass(eq=False)
class Passage:
    samples: int = 0
    looked_up: tuple[int, int] | None = None
    """From and until when the cache was asked."""
    found: int = 0
    """How many of its samples were there."""
    passes: list[Pass] = field(default_factory=list)


def _fresh() -> Mark:
    return Mark(f"{_random_bits(128):032x}", f"{_random_bits(64):016x}")


@dataclass(eq=False)
class Trail:
    mark: Mark = field(default_factory=_fresh)
    """Our own span for this call."""
    parent_id: str = ""
    """The caller's span; empty where this is the first of its trace."""
    sampled: bool | None = None
    """Whether the caller wants it recorded; None where nobody has said."""
    began: int = field(default_factory=monotonic_ns)
    passages: list[Passage] = field(default_factory=list)

    @classmethod
    def following(cls, traceparent: str | None) -> "Trail":
        """That of a call with such a header. One that cannot be used counts as none, as the specification says."""
        found = _TRACEPARENT.fullmatch(traceparent or "")
        if found is None:
            return cls()
        trace_id, parent_id, flags = found.groups()
        if not trace_id.strip("0") or not parent_id.strip("0"):
            return cls()
        return cls(Mark(trace_id, f"{_random_bits(64):016x}"), parent_id, bool(int(flags, 16) & _SAMPLED))

    @property
    def trace_ids(self) -> tuple[str, ...]:
        return (self.mark.trace_id,)

    def own_passes(self) -> list[Pass]:
        """Those at this call's charge."""
        return [one for passage in self.passages for one in passage.passes if one.host is self.mark]

    def waited(self) -> tuple[int, int]:
        """Nanoseconds in the queue and in computation, of what was computed at this call's charge."""
        passes = self.own_passes()
        if not passes:
            return 0, 0
        computing = sum(one.ended - one.began for one in passes)
        whole = max(one.ended for one in passes) - min(one.queued for one in passes)
        return max(0, whole - computing), computing


_concerned: ContextVar[Iterable[object]] = ContextVar("concerned", default=())


def concern(*whom: object) -> None:
    """From here on whatever this task or thread logs concerns these: those of them that are `Traced`."""
    _concerned.set(whom)


def concerned() -> list[str]:
    """The trace ids that this context is about, each once."""
    ids = (trace_id for one in _concerned.get() if hasattr(one, "trace_ids") for trace_id in one.trace_ids)
    return list(dict.fromkeys(ids))
