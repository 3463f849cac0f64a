"""What it costs to be seen: an access line, the trail that it is made of, and spans on and off.

Claim    a call's trail and its line cost some tens of microseconds, on the event loop about half of that; without
         --otlp-endpoint spans cost nothing, with it the loop pays the handing over, and threads the rest.
Method   one call that was computed, as it ends in a server, again and again. Rounds are interleaved: in each, every
         way is timed by the CPU time of the calling thread and by that of the whole process (for the threads that
         write, make spans and send them), over CALLS calls; then the median and the range over rounds. Lines go to
         /dev/null, spans to a collector in a process of its own, which is asked to take them all.
Machine  stated by the output.
n        ROUNDS rounds of CALLS calls.

    python benchmarks/observing.py
"""

import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import grpc
from google.rpc import code_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from teacher_server.access import Ended, log_call
from teacher_server.auth import Caller
from teacher_server.log_lines import logging_to
from teacher_server.server import watched
from teacher_server.trails import Pass, Passage, Trail, concern

ROUNDS, CALLS = 15, 200
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
ANSWERED = {"computed": 64, "cached": 0, "coalesced": 0, "charged": 64, "cost": 0.064, "currency": "USD"}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def Export(self, *_: object) -> trace_service_pb2.ExportTraceServiceResponse:  # noqa: N802 - OTLP's name
        return trace_service_pb2.ExportTraceServiceResponse()


def collect() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    print(f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    server.start()
    server.wait_for_termination()


def trail() -> Trail:
    """That of a call which was computed in one batch."""
    made = Trail.following(TRACEPARENT)
    concern(made)
    passage, now = Passage(64), time.monotonic_ns()
    made.passages.append(passage)
    passage.looked_up = (now, now)
    passage.passes.append(Pass(made.mark, 7, 64, 64, (made.mark,), now, now, now, now))
    return made


def ended() -> Ended:
    return Ended(
        call="Label",
        trail=trail(),
        ended=time.monotonic_ns(),
        code=code_pb2.OK,
        reason="",
        caller=Caller("team", "sweep/17"),
        peer="ipv4:127.0.0.1:45678",
        request_bytes=123456,
        reply_bytes=2345,
        answered=ANSWERED,
    )


def timed(act: Callable[[], object], rest: float) -> tuple[float, float]:
    """Microseconds of CPU that one call takes: in this thread, and in all."""
    process, thread = time.process_time_ns(), time.thread_time_ns()
    for _ in range(CALLS):
        act()
    thread = time.thread_time_ns() - thread
    time.sleep(rest)  # costs no CPU; the other threads finish
    return thread / CALLS / 1000, (time.process_time_ns() - process) / CALLS / 1000


def main() -> int:
    if sys.argv[1:] == ["collect"]:
        collect()
        return 0
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, __file__, "collect"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as collector,
        Path(os.devnull).open("w") as nowhere,
        logging_to(nowhere),
    ):
        url = collector.stdout.readline().strip() if collector.stdout else ""
        try:
            with watched(None) as off, watched(url) as on:
                ways: dict[str, Callable[[], object]] = {
                    "trail": trail,
                    "trail, ended": ended,
                    "trail, ended, line": lambda: log_call(ended()),
                    "the same, as served without --otlp-endpoint": lambda: off(ended()),
                    "the same, as served with it": lambda: on(ended()),
                }
                rounds = [{name: timed(act, 0.3) for name, act in ways.items()} for _ in range(ROUNDS + 1)][1:]
        finally:
            collector.terminate()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"CPU microseconds a call, median (range) of {ROUNDS} rounds of {CALLS}; {threading.active_count()} threads")
    for name in ways:
        for which, column in (("its own thread", 0), ("all threads", 1)):
            times = [found[name][column] for found in rounds]
            print(f"{name:44} {which:14} {statistics.median(times):6.1f} ({min(times):.1f} to {max(times):.1f})")
    differences = [found[list(ways)[3]][0] - found[list(ways)[2]][0] for found in rounds]
    print(
        f"off costs {statistics.median(differences):+.1f} ({min(differences):+.1f} to {max(differences):+.1f}), paired"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
