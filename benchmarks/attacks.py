"""What attacks get, and what they cost the server: a markdown table, as it stands in docs/security.md.

Claim    whoever has no token, another's, or a bad will gets a refusal; the server's memory stays bounded, and a student
         who asks beside the attack is answered rightly.
Method   two servers in processes of their own (tests.teachers:tiny, tokens; the second with mTLS). Each attack of
         tests/attacking.py runs from this process while another thread, tenant white, asks for 4 samples every 20 ms
         and checks the answers. Memory is the server's VmRSS before and after, and its peak meanwhile (VmHWM, set back
         before each attack).
Machine  stated by the output. Loopback; the attacker's connections to HTTP come from 127.0.0.2.
n        each attack once, with the counts that the table says.

    python -m benchmarks.attacks [--malformed 100000] [--fewer]
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
from redis import Redis

from protos import teacher_pb2 as pb
from protos import wire
from protos.keys import sample_keys
from student_worker import TeacherClient
from student_worker.errors import TeacherError
from teacher_server.tokens import add_token, new_token
from tests import attacking
from tests.asking import asking, metric, pixels
from tests.attacking import Legit, Target
from tests.certificates import Authority, served_with, showing
from tests.redis_servers import running
from tests.serving import arguments

MIB = 2**20


class Server:
    """A process with its log in a file; killed when left."""

    def __init__(self, folder: Path, name: str, **settings: object) -> None:
        self.tokens_file = folder / f"{name}-tokens"
        self.tokens_file.touch()
        self._log = folder / f"{name}.log"
        given = arguments(folder) | {"tokens_file": self.tokens_file, "state_directory": folder / name} | settings
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items() if value is not None]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "teacher_server", "serve", *flags], stdout=subprocess.PIPE, stderr=log, text=True
            )
        line = self.process.stdout.readline() if self.process.stdout else ""
        if "ready" not in line:
            raise SystemExit(f"no server: {self._log.read_text()}")
        self.grpc_address = line.split("grpc ")[1].split(",")[0]
        self.http_address = line.split("http ")[1].split(",")[0]
        self.fingerprint = line.split("(")[1].split(")")[0]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def memory(self) -> dict[str, int]:
        """VmRSS and VmHWM in MiB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith("Vm")}

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def logged(self) -> int:
        return self._log.read_text().count("\n")


class Table:
    def __init__(self) -> None:
        print("| attack | what was sent | what it got | MiB before, after (peak) | s | beside it: p50, max ms; wrong |")
        print("|---|---|---|---|---|---|")

    def row(self, server: Server, target: Target, name: str, sent: str, attack: Callable[[], object]) -> None:
        server.forget_peak()
        before, lines = server.memory()["VmRSS"], server.logged()
        with Legit(target) as legit:
            began = time.monotonic()
            got = said(attack())
            seconds = time.monotonic() - began
            while len(legit.milliseconds) < 5:
                time.sleep(0.01)
        after = server.memory()
        logged = f"; {new} log lines" if (new := server.logged() - lines) else ""
        beside = f"{statistics.median(legit.milliseconds):.0f}, {max(legit.milliseconds):.0f}; "
        beside += f"{len(legit.failures)} of {len(legit.milliseconds)}"
        memory = f"{before}, {after['VmRSS']} ({after['VmHWM']})"
        print(f"| {name} | {sent} | {got}{logged} | {memory} | {seconds:.1f} | {beside} |", flush=True)


def said(got: object) -> str:
    if isinstance(got, dict):
        return ", ".join(
            f"{count:,} {what}" if isinstance(got, Counter) else f"{what}: {count}" for what, count in got.items()
        )
    return str(got)


def planted(server: Server, target: Target, redis_url: str) -> str:
    """Overwrites what is cached, as who has the cache's password might."""
    x = pixels(3, seed=11)
    with target.stub() as stub, Redis.from_url(redis_url) as cache:

        def ask() -> pb.LabelResponse:
            return stub.Label(asking(x, pb.CACHE_MODE_USE), metadata=target.metadata("student"))

        right = ask()
        while len(cache.keys("*")) < 3:
            time.sleep(0.01)
        names = [
            next(name for name in cache.keys("*") if name.endswith(key))
            for key in sample_keys(server.fingerprint, {"x": x})
        ]
        entry, other = cache.get(names[0]), cache.get(names[1])
        cache.set(names[0], other)
        cache.set(names[1], entry[:1] + np.full(10, 9, np.float32).tobytes() + entry[41:])
        cache.set(names[2], b"rubbish")
        again = ask()
    counted = metric(server, "preceptor_cache_errors_total", token=target.tokens["viewer"], kind="corrupt")
    same = np.allclose(*(wire.decode_answers(r.answers[0]) for r in (right, again)), rtol=1e-4, atol=1e-4)
    sources = {pb.Source.Name(source).removeprefix("SOURCE_").lower() for source in again.sources}
    return f"{'the right answers' if same else 'WRONG ANSWERS'}, {' and '.join(sources)} anew; counted: {counted:.0f}"


def malformed(target: Target, count: int) -> attacking.Got:
    return attacking.messages(target, attacking.mutations(count))


def silent_streams(target: Target, count: int) -> attacking.Got:
    """Calls with a token that never send their message, until their deadline."""
    with target.channel() as channel, ExitStack() as stack:
        call = channel.stream_unary("/preceptor.v1.Teacher/Label")
        ends = attacking.threading.Event()
        stack.callback(ends.set)

        def nothing() -> Iterator[bytes]:
            ends.wait()
            yield from ()

        calls = [call.future(nothing(), timeout=5, metadata=target.metadata("student")) for _ in range(count)]
        return attacking.Got(each.code().name for each in calls)


def ended(result: tuple[int, float]) -> str:
    return f"{result[0]} connections ended by the server, the last after {result[1]:.0f} s"


def against_tokens_and_messages(
    table: Table, server: Server, target: Target, redis_url: str, counts: argparse.Namespace
) -> None:
    def row(name: str, sent: str, attack: Callable[[], object]) -> None:
        table.row(server, target, name, sent, attack)

    many, http = (300, 200) if counts.fewer else (1000, 500)
    row("no token", "every call and page", lambda: attacking.no_token(target))
    row("a guessed token", "every call and page", lambda: attacking.no_token(target, "guess"))
    row("another tenant's job", "its name and its request id", lambda: attacking.anothers_job(target))
    row(
        "a student on an admin's calls",
        "PUT, DELETE budgets; others' spend, /metrics",
        lambda: attacking.student_on_admin_calls(target),
    )
    row("a viewer that asks", "Label, Lookup", lambda: attacking.viewer_asks(target))
    row("a revoked token, connection open", "Label, revoke, Label", lambda: ", then ".join(attacking.revoked(target)))
    row(
        "planted cache answers",
        "in Redis: another's value, other numbers, rubbish",
        lambda: planted(server, target, redis_url),
    )
    row("oversize message", "65 MiB", lambda: attacking.messages(target, [bytes(65 * MIB)]))
    row(
        "message bomb",
        "64 MB of empty submessages, 4 times",
        lambda: attacking.messages(target, [attacking.empty_submessages(64_000_000)] * 4),
    )
    row(
        "compression bomb",
        f"60 MiB of zeros as {attacking.zipped_size(60 * MIB) // 1024} KiB of gzip",
        lambda: attacking.compressed(target, 60 * MIB),
    )
    row("malformed messages", f"{counts.malformed:,}, random and mutated", lambda: malformed(target, counts.malformed))
    row(
        "flood of guesses",
        f"{20 * many:,} Label calls of 64 samples",
        lambda: attacking.unauthenticated(target, 20 * many),
    )
    row(
        "large probes, no token",
        "200 health checks of 8 MiB",
        lambda: attacking.large_health_checks(target, 200, 8 * MIB),
    )
    row("health streams, no token", f"{many} Watch calls", lambda: attacking.watchers(target, many))
    row("calls without a message", "600 by one tenant, 5 s", lambda: silent_streams(target, 600))
    row("slowloris, HTTP", f"{http} connections, 5 bytes a second", lambda: ended(attacking.slowloris(target, http)))
    row(
        "slowloris, gRPC",
        f"{http} connections that begin and go silent",
        lambda: ended(attacking.slowloris(target, http, "grpc")),
    )
    row(
        "slow reader",
        "/openapi.json asked for again and again, nothing read",
        lambda: "{} after {:.0f} s".format(*attacking.slow_reader(target)),
    )
    row("header flood, HTTP", "1 MB of headers", lambda: attacking.header_flood(target, MIB))
    row("header flood, gRPC", "1 MB of metadata", lambda: attacking.large_metadata(target, MIB))


def against_trust(folder: Path) -> None:
    """Certificates: who is let in, and how soon the others hear why."""
    ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
    here = "127.0.0.1"
    secret, token = new_token("red")
    print("\n| certificate | what it got | after |\n|---|---|---|")

    def ask(name: str, server: Server, **trust: object) -> None:
        add_token(server.tokens_file, token) if not server.tokens_file.read_text() else None
        began = time.monotonic()
        try:
            with TeacherClient(server.grpc_address, token=secret, **trust) as client:
                got = f"{len(client.label(pixels(3)).sources)} answers"
        except TeacherError as error:
            got = f"{type(error).__name__}: {str(error).partition(': ')[2]}"
        print(f"| {name} | {got} | {time.monotonic() - began:.2f} s |", flush=True)

    with Server(folder, "mtls", **served_with(ours.issue(here), ours.file)) as server:
        mine = ours.issue("student")
        ask("client's, of the right CA", server, ca_file=ours.file, **showing(mine))
        ask("client's, expired", server, ca_file=ours.file, **showing(ours.issue("student", expired=True)))
        ask("client's, of another CA", server, ca_file=ours.file, **showing(theirs.issue("student")))
        ask("none under mTLS", server, ca_file=ours.file)
        ask("clear text to a TLS port", server)
        ask("server's, of a CA that is not trusted", server, ca_file=theirs.file, **showing(mine))
    with Server(folder, "expired", **served_with(ours.issue(here, expired=True))) as server:
        ask("server's, expired", server, ca_file=ours.file)


@contextmanager
def _attacked(folder: Path) -> Iterator[tuple[Server, Target, str]]:
    with running(folder):
        url = f"unix://{folder}/redis.sock"  # redis.url works in this process alone
        with Server(folder, "tokens", cache_redis_url=url) as server:
            yield server, Target(server.grpc_address, server.http_address, server.tokens_file), url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--malformed", type=int, default=100_000)
    parser.add_argument("--fewer", action="store_true", help="fewer connections and calls")
    counts = parser.parse_args()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    print(
        f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, grpcio {grpc.__version__}\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _attacked(folder) as (server, target, redis_url):
            against_tokens_and_messages(Table(), server, target, redis_url, counts)
        against_trust(folder)


if __name__ == "__main__":
    main()
