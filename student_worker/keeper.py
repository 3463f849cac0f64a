"""Keeps the list of replicas: asks for it, probes those that are out, and moves the calls of those that hang."""

import threading
from time import monotonic
from typing import Any, cast

import grpc

from protos import teacher_pb2 as pb
from student_worker.replica import Link, Replica
from student_worker.replicas import Replicas
from student_worker.trace import unrecorded

LIST_SECONDS = 2.0
"""From one look at a server's list to the next."""
_TICK_SECONDS = 0.2
_TICKS_A_LIST = round(LIST_SECONDS / _TICK_SECONDS)
_PROBE_TIMEOUT = 2.0
_OVERSLEPT_SECONDS = 1.0


class Keeper:
    """A daemon thread, until `closed`. It waits for no call: what has begun is looked at again at its next turn."""

    def __init__(self, replicas: Replicas, closed: threading.Event, metadata: list[tuple[str, str]]) -> None:
        self._replicas, self._closed, self._metadata = replicas, closed, metadata
        self._probes: list[tuple[Replica, Link, Any]] = []  # with grpc's future, whose types have no base
        self._list: tuple[Replica, Link, Any] | None = None
        threading.Thread(target=self._run, name="teacher-client-keeper", daemon=True).start()

    def _run(self) -> None:
        turn, woke, overslept = 0, monotonic(), False
        while not self._closed.wait(_TICK_SECONDS):
            turn, before, woke = turn + 1, woke, monotonic()
            # Who was stopped himself has answers waiting: for one turn nobody is said to hang.
            overslept = woke - before > _OVERSLEPT_SECONDS and not overslept
            if not overslept:
                self._replicas.leave_the_hung()
            self._harvest()
            self._probes += [(replica, link, self._described(link)) for replica, link in self._replicas.to_probe()]
            if turn % _TICKS_A_LIST == 0 and self._list is None:
                someone = self._replicas.someone(turn // _TICKS_A_LIST)
                self._list = someone and (*someone, self._described(someone[1]))

    def _described(self, link: Link) -> Any:
        """The future of a Describe of all teachers there; None where the link is closed already."""
        metadata = [*self._metadata, *unrecorded()]
        try:
            return link.stub.Describe.future(pb.DescribeRequest(), timeout=_PROBE_TIMEOUT, metadata=metadata)
        except ValueError:  # grpc's word for it
            return None

    def _harvest(self) -> None:
        if self._list is not None and _is_done(future := self._list[2]):
            replica, link, _ = self._list
            self._list = None
            if (reply := _reply(future)) is not None:
                self._replicas.told(replica, link, reply)
        under_way, self._probes = self._probes, []
        for replica, link, future in under_way:
            if _is_done(future):
                fault = "" if future is None else future.details()
                self._replicas.probed(replica, link, _reply(future), fault)
            else:
                self._probes.append((replica, link, future))


def _is_done(future: Any) -> bool:
    return future is None or bool(future.done())


def _reply(future: Any) -> pb.DescribeResponse | None:
    if future is None or future.code() is not grpc.StatusCode.OK:
        return None
    return cast("pb.DescribeResponse", future.result())
