"""One replica of a teacher, as one student sees it."""

import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import grpc

from protos import teacher_pb2_grpc

_REMEMBERED = 99  # calls; of so few, the p99 by nearest rank is the slowest


class State(Enum):
    """How they follow upon one another stands in replicas.py."""

    IN = "in rotation"
    OUT = "out"
    OTHER = "another teacher"


class Link:
    """One channel to a replica, and the calls in flight on it."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = teacher_pb2_grpc.TeacherStub(channel)
        self.close = channel.close
        self.flying: dict[int, float] = {}  # when each call began
        self.answered = -math.inf  # when one was, last
        self.left = False  # closed under its calls, which go elsewhere


@dataclass(eq=False)
class Replica:
    address: str
    link: Link
    state: State
    seed: bool
    """Whether the student was given its address."""
    listed: bool = False
    missed: int = 0  # lists in a row
    samples: int = 0  # in flight
    used: int = 0  # the number of its last call
    strikes: int = 0  # how often it was left since it last answered a call
    probe_at: float = math.inf
    probing: bool = False
    warned: bool = False  # that nobody was found there
    out_since: float = -math.inf
    fingerprint: str = ""  # of the OTHER teacher
    waited: float = 0.0
    """How long it had answered nothing when it was last left for that; 0 once it has answered a call since."""
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    @property
    def p99(self) -> float:
        """Seconds; 0 before the first answer."""
        return max(self.waited, *self.latencies, 0.0)


class Flight(NamedTuple):
    """One call's place: at whom, over which link."""

    replica: Replica
    link: Link
    number: int
    samples: int
    began: float
