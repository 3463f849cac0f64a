"""Keeps the list of replicas: asks for it, probes those that are out, and moves the calls of those that hang."""

import threading
from typing import Any, cast

import grpc

from protos import teacher_pb2 as pb
from student_worker.replicas import Link, Replica, Replicas

LIST_SECONDS = 2.0
"""From one look at a server's list to the next."""
_TICK_SECONDS = 0.2
_TICKS_A_LIST = round(LIST_SECONDS / _TICK_SECONDS)
_PROBE_TIMEOUT = 2.0


class Keeper:
    """A daemon thread, until `closed`. It waits for no call: what has begun is looked at again at its next turn."""

    def __init__(self, replicas: Replicas, closed: threading.Event, metadata: list[tuple[str, str]]) -> None:
        self._replicas, self._closed, self._metadata = replicas, closed, metadata
        self._probes: list[tuple[Replica, Link, Any]] = []  # with grpc's future, whose types have no base
        self._list: Any = None
        threading.Thread(target=self._run, name="teacher-client-keeper", daemon=True).start()

    def _run(self) -> None:
        turn = 0
        while not self._closed.wait(_TICK_SECONDS):
            turn += 1
            self._replicas.leave_the_hung()
            self._harvest()
            self._probes += [(replica, link, self._described(link)) for replica, link in self._replicas.to_probe()]
            if turn % _TICKS_A_LIST == 0 and self._list is None:
                replica = self._replicas.anyone(turn // _TICKS_A_LIST)
                self._list = replica and self._described(replica.link)

    def _described(self, link: Link) -> Any:
        """The future of a Describe of all teachers there; None where the link is closed already."""
        try:
            return link.stub.Describe.future(pb.DescribeRequest(), timeout=_PROBE_TIMEOUT, metadata=self._metadata)
        except ValueError:  # grpc's word for it
            return None

    def _harvest(self) -> None:
        if self._list is not None and self._list.done():
            if self._list.code() is grpc.StatusCode.OK:
                self._replicas.learn(self._list.result().replicas)
            self._list = None
        under_way, self._probes = self._probes, []
        for replica, link, future in under_way:
            if future is not None and not future.done():
                self._probes.append((replica, link, future))
                continue
            if future is not None and future.code() is grpc.StatusCode.OK:
                reply = cast("pb.DescribeResponse", future.result())
                self._replicas.probed(replica, link, reply)
                self._replicas.learn(reply.replicas)
            else:
                self._replicas.probed(replica, link, None, "" if future is None else future.details())
