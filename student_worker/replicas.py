"""The replicas of a teacher as one student sees them: who is in rotation, what is in flight where, who hangs.

Bookkeeping alone: whoever calls, probes or lists says here what he saw. A replica is in one of three states.

    IN     takes calls
    OUT    does not: it refused, it hung, or nobody has looked yet; it is probed over a connection of its own
    OTHER  answers, but as another teacher than the run's; it is probed too, for it may change back

    (new)   -> OUT    it is listed by a server. The addresses that the student was given begin IN, until the teacher is
                      pinned; then those that have not answered are OUT
    OUT     -> IN     a probe, or a call of last resort, was answered by the run's teacher
    IN      -> OUT    a call was refused with UNAVAILABLE, or ended by the server: what else is in flight there goes on;
                      or it hangs, while another is in rotation: all that is in flight there ends, and goes elsewhere
    IN, OUT -> OTHER  it said so
    forgotten         once three lists lacked it, unless the student was given its address, or it answers and nothing
                      that is listed is IN

What comes in over a link that was given up meanwhile changes no state: a late failure says nothing of the present.
"""

import logging
import math
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from time import monotonic

import grpc

from protos import teacher_pb2 as pb
from student_worker.replica import Flight, Link, Replica, State

_log = logging.getLogger(__name__)

P99_MULTIPLE = 5
"""A replica hangs when calls are in flight there, and none was answered for so many times its own p99."""
LEAST_PATIENCE = 2.0
"""But not before so many seconds."""
PROBE_SECONDS = 1.0
"""From leaving a replica to its first probe, and from probe to probe."""
_LONGEST_BREAK = 30.0  # for a replica that answers probes and nothing else, over and over
_DOUBLINGS = 5  # until that: a number without bound would in the end fit no float
_MISSED_LISTS = 3  # servers read the list at different times, so one may lack who stands in another's


class _After:
    """What waits until the lock is released: links may take a moment to close, and a log may be slow."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.words: list[tuple[int, str]] = []


class Replicas:
    """Thread-safe; the lock is never held over a call. `connect` makes a channel to an address, and does not wait."""

    def __init__(
        self,
        seeds: Iterable[str],
        connect: Callable[[str], grpc.Channel],
        timeout: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._connect, self._clock = connect, clock
        self._longest_patience = timeout / 2  # a query that is moved then has as long elsewhere
        self._lock = threading.Lock()
        self._closed = False
        self._links: dict[Link, Replica] = {}  # all that are open
        self._members: dict[str, Replica] = {}
        self._teacher, self._fingerprint = "", ""
        self._was_listed = False
        self._elsewhere: dict[str, str] = {}  # fingerprints of other teachers, as they are listed
        self._calls = count(1)
        self.heard = -math.inf  # when the run's teacher last said anything
        for address in seeds:
            self._join(address, State.IN, seed=True)
        self._changed()

    # ---------------------------------------------------------------- calls

    def take(self, samples: int, tried: Container[str]) -> Flight | None:
        """A call's place at the replica with the fewest samples in flight, among equals the one unused for longest.

        Of those in rotation; where there is none, of those that are out, and of other teachers last. None where all
        these were `tried`.
        """
        with self._lock:
            free = [replica for replica in self._candidates if replica.address not in tried]
            if not free:
                return None
            replica = min(free, key=lambda one: (one.samples, one.used))
            replica.used = number = next(self._calls)
            replica.samples += samples
            flight = Flight(replica, replica.link, number, samples, self._clock())
            flight.link.flying[number] = flight.began
            return flight

    def untried(self, tried: Container[str]) -> bool:
        return any(replica.address not in tried for replica in self._candidates)

    def answered(self, flight: Flight) -> None:
        """By the run's teacher."""
        now = self._clock()
        replica = flight.replica
        with self._lock:
            replica.latencies.append(now - flight.began)
            flight.link.answered = self.heard = now
            replica.strikes = 0
            if self._is_current(replica, flight.link):
                replica.waited = 0.0
                if replica.state is not State.IN and flight.began >= replica.out_since:  # and not just finishing
                    self._set(replica, State.IN)
            done = self._land(flight)
        if done:
            flight.link.close()

    def refused(self, flight: Flight) -> None:
        """For now, or for good, by a teacher that is there."""
        with self._changing() as after:
            self.heard = self._clock()
            self._end(flight, after)

    def lost(self, flight: Flight, why: str) -> None:
        """No answer: nobody is there, or he is going."""
        with self._changing() as after:
            replica = flight.replica
            if replica.state is State.IN and self._is_current(replica, flight.link):
                self._leave(replica)
                if self._rotation:
                    after.words.append((logging.WARNING, f"{why}; asking the others until it answers again"))
            self._end(flight, after)

    def other(self, flight: Flight, fingerprint: str) -> None:
        """Another teacher is there."""
        with self._changing() as after:
            if self._is_current(flight.replica, flight.link):
                self._is_other(flight.replica, fingerprint)
            self._end(flight, after)

    def dropped(self, flight: Flight) -> None:
        """By its caller: this says nothing of the replica."""
        with self._changing() as after:
            self._end(flight, after)

    # ---------------------------------------------------------------- what the keeper sees

    def expect(self, teacher: str, fingerprint: str) -> None:
        """The run's teacher; empty: any."""
        with self._lock:
            self._teacher, self._fingerprint = teacher, fingerprint

    def pin(self, teacher: str, fingerprint: str) -> None:
        """The run's teacher, from here on. Who has not answered as such is out until a probe was."""
        self.expect(teacher, fingerprint)
        with self._changing():
            for replica in self._members.values():
                if replica.state is State.IN and replica.link.answered == -math.inf:
                    self._set(replica, State.OUT)
                    replica.probe_at = self._clock() + PROBE_SECONDS

    def leave_the_hung(self) -> None:
        """Ends all calls in flight at those who hang, where another is in rotation; callers take another place."""
        now = self._clock()
        with self._changing() as after:
            for link, replica in list(self._links.items()):
                if not link.flying:
                    continue
                waited = now - max(min(link.flying.values()), link.answered)
                elsewhere = any(one is not replica or one.link is not link for one in self._rotation)
                if waited <= self._patience(replica) or not elsewhere:
                    continue
                after.words.append(
                    (
                        logging.WARNING,
                        f"{replica.address}: has answered nothing for {waited:.1f} s; the {len(link.flying)} calls in "
                        "flight there go to the others",
                    )
                )
                if self._is_current(replica, link):
                    replica.waited = waited  # where all are slow, each is left a few times and no more
                    if replica.state is State.IN:
                        self._leave(replica)
                    replica.link = self._open(replica)
                link.left = True
                self._give_up(link, after)

    def to_probe(self) -> list[tuple[Replica, Link]]:
        """Those whose turn it is, each with a link of its own: a connection that hangs would say nothing new."""
        now = self._clock()
        with self._lock:
            due = [
                one
                for one in self._members.values()
                if one.state is not State.IN and one.probe_at <= now and not one.probing
            ]
            for replica in due:
                replica.probing, replica.probe_at = True, now + PROBE_SECONDS
            return [(replica, self._open(replica)) for replica in due]

    def probed(self, replica: Replica, link: Link, reply: pb.DescribeResponse | None, fault: str = "") -> None:
        """None where there was no reply, for the `fault` that gRPC names."""
        with self._changing() as after:
            replica.probing = False
            if self._members.get(replica.address) is not replica or replica.state is State.IN:
                self._give_up(link, after)  # forgotten, or found, in the meantime
            elif reply is not None and not _is_leaving(reply) and self._is_ours(reply):
                former, replica.link = replica.link, link
                self._set(replica, State.IN)
                after.words.append((logging.INFO, f"{replica.address}: answers, and takes its share"))
                if not former.flying:  # else its last call closes it
                    self._give_up(former, after)
            else:
                self._give_up(link, after)
                if reply is not None and not self._is_ours(reply):
                    self._is_other(replica, ", ".join(teacher.fingerprint for teacher in reply.teachers))
                else:
                    self._set(replica, State.OUT)
                if reply is None and replica.listed and not (replica.warned or replica.latencies):
                    replica.warned = True
                    after.words.append(
                        (logging.WARNING, f"{replica.address}: is listed as a replica, but cannot be used: {fault}")
                    )
        if reply is not None:
            self.learn(reply.replicas)

    def someone(self, number: int) -> tuple[Replica, Link] | None:
        """One to ask for the list, another one at each number: the addresses that were given are among them, since the
        only one in rotation may hang, and be replaced elsewhere."""
        with self._lock:
            answering = [replica for replica in self._members.values() if replica.state is State.IN]
            if not answering:
                return None
            replica = answering[number % len(answering)]
            return replica, replica.link

    def told(self, replica: Replica, link: Link, reply: pb.DescribeResponse) -> None:
        """What one said when it was asked for the list."""
        with self._changing():
            current = replica.state is State.IN and self._is_current(replica, link)
            if _is_leaving(reply) and current and len(self._rotation) > 1:
                self._leave(replica)
        self.learn(reply.replicas)

    def learn(self, replicas: Sequence[pb.Replica]) -> None:
        """Those that a server knows. An empty list says nothing: its Redis may have lost everything."""
        ours = [
            one.address
            for one in replicas
            if one.fingerprint == self._fingerprint and self._teacher in ("", one.teacher)
        ]
        with self._changing() as after:
            if self._closed or not replicas:
                return
            self._elsewhere = {one.address: one.fingerprint for one in replicas if one.address not in ours}
            self._was_listed |= bool(ours)
            for address in ours:
                replica = self._members.get(address) or self._join(address, State.OUT, seed=False)
                if not replica.listed:
                    replica.listed, replica.probe_at = True, min(replica.probe_at, self._clock())
                replica.missed = 0
            for replica in list(self._members.values()):
                if replica.address not in ours:
                    self._missing(replica, after)
            self._changed()

    # ---------------------------------------------------------------- what is known

    @property
    def addresses(self) -> list[str]:
        with self._lock:
            return [*self._members]

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def in_rotation(self) -> list[str]:
        with self._lock:
            return [replica.address for replica in self._rotation]

    def others(self) -> dict[str, str]:
        """The fingerprints of other teachers that answer, or are listed, by address."""
        with self._lock:
            said = {one.address: one.fingerprint for one in self._members.values() if one.state is State.OTHER}
            return self._elsewhere | said

    def all_other(self) -> bool:
        """Whether to wait is of no use. Who was in a list once may be starting at another address."""
        with self._lock:
            return not self._was_listed and all(replica.state is State.OTHER for replica in self._members.values())

    def close(self) -> None:
        """Ends all calls in flight; links that are made later are closed from the start."""
        with self._changing() as after:
            self._closed = True
            for link in list(self._links):
                self._give_up(link, after)

    # ---------------------------------------------------------------- inside, under the lock

    @contextmanager
    def _changing(self) -> Iterator[_After]:
        after = _After()
        try:
            with self._lock:
                yield after
        finally:
            for link in after.links:
                link.close()
            for level, words in after.words:
                _log.log(level, "%s", words)

    def _join(self, address: str, state: State, *, seed: bool) -> Replica:
        replica = Replica(address, Link(self._connect(address)), state, seed)
        self._links[replica.link] = self._members[address] = replica
        return replica

    def _open(self, replica: Replica) -> Link:
        link = Link(self._connect(replica.address))
        if self._closed:
            link.close()
        else:
            self._links[link] = replica
        return link

    def _give_up(self, link: Link, after: _After) -> None:
        if self._links.pop(link, None):
            after.links.append(link)

    def _land(self, flight: Flight) -> bool:
        """Whether its link has now had its last call."""
        del flight.link.flying[flight.number]
        flight.replica.samples -= flight.samples
        replica, link = flight.replica, flight.link
        if link.flying or self._is_current(replica, link):
            return False
        return self._links.pop(link, None) is not None

    def _is_current(self, replica: Replica, link: Link) -> bool:
        """Neither given up nor, with its replica, forgotten."""
        return replica.link is link and self._members.get(replica.address) is replica

    def _end(self, flight: Flight, after: _After) -> None:
        if self._land(flight):
            after.links.append(flight.link)

    def _set(self, replica: Replica, state: State) -> None:
        replica.state = state
        self._changed()

    def _leave(self, replica: Replica) -> None:
        pause = min(PROBE_SECONDS * 2 ** min(replica.strikes, _DOUBLINGS), _LONGEST_BREAK)
        replica.strikes += 1
        replica.out_since = self._clock()
        replica.probe_at = replica.out_since + pause
        self._set(replica, State.OUT)

    def _is_other(self, replica: Replica, fingerprint: str) -> None:
        replica.fingerprint = fingerprint or replica.fingerprint  # a refused query does not say which it is
        replica.out_since = self._clock()
        replica.probe_at = replica.out_since + PROBE_SECONDS
        self._set(replica, State.OTHER)

    def _is_ours(self, reply: pb.DescribeResponse) -> bool:
        return any(one.fingerprint == self._fingerprint and self._teacher in ("", one.name) for one in reply.teachers)

    def _missing(self, replica: Replica, after: _After) -> None:
        replica.missed += 1
        if replica.missed < _MISSED_LISTS:
            return
        replica.listed = False
        listed_in = any(one.listed and one.state is State.IN for one in self._members.values())
        if not replica.seed and (replica.state is State.OUT or listed_in):  # whoever answers may yet tell of others
            del self._members[replica.address]
            if not replica.link.flying:  # else its last call closes it
                self._give_up(replica.link, after)

    def _patience(self, replica: Replica) -> float:
        """Of one that has answered nothing yet, as of the slowest other; where nobody has, the longest there is."""
        p99 = replica.p99 or max(one.p99 for one in self._members.values())
        return min(max(LEAST_PATIENCE, P99_MULTIPLE * p99) if p99 else math.inf, self._longest_patience)

    def _changed(self) -> None:
        """An address that was given may lead to a listed replica by another name, and he is not counted twice."""
        in_ = [replica for replica in self._members.values() if replica.state is State.IN]
        self._rotation = [replica for replica in in_ if replica.listed] or in_
        out = [replica for replica in self._members.values() if replica.state is State.OUT]
        self._candidates = self._rotation or out or list(self._members.values())


def _is_leaving(reply: pb.DescribeResponse) -> bool:
    """A replica that drains knows its address, and stands in the list no more."""
    return bool(reply.address) and all(one.address != reply.address for one in reply.replicas)
