"""What tokens, TLS and metering cost a query.

Claim    knowing who asks and counting what it cost is a small part of a query's time.
Method   in this process: each stage alone, LOOPS times a round; the median over ROUNDS rounds of a round's mean.
         Over gRPC: two servers in processes of their own (tests.teachers:tiny, one sample a query), one in clear text
         without tokens, one with tokens and TLS; queries alternate between them, so that each pair sees
         the same machine; the median of the differences, with a bootstrapped 95 % interval.
Machine  stated by the output.
n        ROUNDS rounds of LOOPS; PAIRS pairs.

    python -m benchmarks.guard
"""

import asyncio
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import numpy as np

from benchmarks.attacks import Server
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc
from teacher_server.auth import Authenticator, Caller
from teacher_server.config import LedgerConfig, StoreConfig
from teacher_server.ledger import Ledger
from teacher_server.metrics import Metrics
from teacher_server.postings import Charge
from teacher_server.store import open_stores
from teacher_server.tokens import add_token, digest_of, new_token
from tests.asking import asking, pixels
from tests.certificates import Authority, served_with

ROUNDS, LOOPS, PAIRS, TOKENS = 15, 2000, 1500, 1000
TEACHER = pb.TeacherDescription(name="t", flops_per_sample=1e9, price=pb.Price(nanos_per_sample=5, currency="EUR"))


def microseconds(stage: Callable[[], object]) -> float:
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(LOOPS):
            stage()
        rounds.append(1e6 * (time.perf_counter() - began) / LOOPS)
    return statistics.median(rounds)


def stages(folder: Path) -> dict[str, float]:
    """Microseconds of each."""
    file = folder / "tokens"
    secrets = [new_token(f"tenant-{number}") for number in range(TOKENS)]
    file.write_text("".join(f"{token.digest} {token.tenant} student\n" for _, token in secrets))
    who = Authenticator.from_file(file)
    metadata = {"authorization": f"Bearer {secrets[0][0]}", "preceptor-job": "run-17", "user-agent": "x"}
    metrics, caller = Metrics(), Caller("tenant-0", "run-17")

    def count() -> None:
        """What service, flights and calls count of one query that was computed."""
        counters = metrics.of(caller)
        counters.asked.inc(4)
        counters.sources["computed"].inc(4)
        metrics.charged(caller, 4, 1000, TEACHER)
        metrics.query(caller, "answered")
        metrics.request("Label", "OK")
        metrics.queue_seconds.observe(0.001)

    return {
        "who asks: stat, SHA-256, look-up, job name": microseconds(lambda: who.caller(metadata)),
        "  of it the stat": microseconds(lambda: os.stat(file)),  # noqa: PTH116
        "  of it SHA-256": microseconds(lambda: digest_of(secrets[0][0])),
        "counters": microseconds(count),
    }


async def booking(folder: Path) -> float:
    """Microseconds: a query is held, noted before and after its forward pass, and posted with others."""
    async with AsyncExitStack() as stack:
        stores = await stack.enter_async_context(open_stores(StoreConfig(state_directory=folder / "state"), 2**30))
        books = Ledger(stores.ledger, LedgerConfig(), folder / "journal", TEACHER, who="benchmark")
        async with books as ledger:
            caller, rounds = Caller("tenant-0", "run-17"), []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                for number in range(LOOPS):
                    hold = await ledger.hold(caller, 4)
                    hold.pay(4)
                    ledger.book(ledger.forwarding(4), [Charge(caller, None, 4, 1000, hold)], [])
                    ledger.answered(caller, asked=4, cached=0, coalesced=0)
                    if number % 20 == 19:
                        await ledger.post()
                rounds.append(1e6 * (time.perf_counter() - began) / LOOPS)
            return statistics.median(rounds)


def paired(folder: Path) -> None:
    authority = Authority(folder, "ca")
    secret, token = new_token("red")
    request = asking(pixels(1))
    with (
        Server(folder, "guarded", **served_with(authority.issue("127.0.0.1"))) as guarded,
        Server(folder, "plain", tokens_file=None) as plain,
    ):
        add_token(guarded.tokens_file, token)
        trust = grpc.ssl_channel_credentials(authority.file.read_bytes())
        metadata = [("authorization", f"Bearer {secret}")]
        with (
            grpc.secure_channel(guarded.grpc_address, trust) as secure,
            grpc.insecure_channel(plain.grpc_address) as clear,
        ):
            calls = [teacher_pb2_grpc.TeacherStub(channel).Label for channel in (secure, clear)]
            times = np.empty((PAIRS + 200, 2))
            for pair in range(len(times)):
                for number in (0, 1) if pair % 2 else (1, 0):
                    began = time.perf_counter()
                    calls[number](request, metadata=(None, metadata)[number == 0])
                    times[pair, number] = 1e6 * (time.perf_counter() - began)
    times = times[200:]  # the first ones warm up
    difference = times[:, 0] - times[:, 1]
    dice = np.random.default_rng(0)
    medians = [np.median(dice.choice(difference, len(difference))) for _ in range(1000)]
    low, high = np.percentile(medians, (2.5, 97.5))
    print(f"{'a whole query, neither':46} {np.median(times[:, 1]):8.1f}")
    print(f"{'a whole query, tokens and TLS':46} {np.median(times[:, 0]):8.1f}")
    spread = f"(95 %: {low:.1f} to {high:.1f}; {PAIRS} pairs)"
    print(f"{'tokens and TLS, median of pairs':46} {np.median(difference):8.1f}  {spread}")


def main() -> None:
    print(
        f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, grpcio {grpc.__version__}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{'':46} {'p50 µs':>8}")
        for stage, time_taken in stages(folder).items():
            print(f"{stage:46} {time_taken:8.1f}")
        print(f"{'ledger: hold, journal, its part of a posting':46} {asyncio.run(booking(folder)):8.1f}")
        paired(folder)


if __name__ == "__main__":
    main()
