"""A Ray of the tests' own, on loopback: started from the command line as users do, and killed by pid.

Run as a program, this file is what kills it: a process that outlives pytest, so that not even a pytest that is killed
leaves a Ray behind.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# Loopback only, no word to anybody outside, and the same answer to "who are you?" at every end (a bare ray.init()
# leaves a token behind that a later `ray start` would demand).
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # "python" in a job's entry point is this one
}


@dataclass(frozen=True)
class RayCluster:
    address: str
    """host:port for ray.init and RAY_ADDRESS."""
    dashboard: str
    """http://host:port for RAY_API_SERVER_ADDRESS."""
    folder: Path
    """Its temporary folder: sessions, with all logs."""

    @property
    def environment(self) -> dict[str, str]:
        """For a process that uses this cluster."""
        names = {"RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.dashboard}
        return os.environ | ENVIRONMENT | names


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in free]


@contextmanager
def ray_cluster(cpus: int = 8, environment: dict[str, str] | None = None) -> Iterator[RayCluster]:
    """`ray start --head`, with so many CPUs to give away whatever the machine has; about 6 s. Killed when left.

    `environment`: more of it, for what runs on the cluster.
    """
    port, dashboard, client, agent = _free_ports(4)
    ports = {
        "port": port,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "min-worker-port": 0,
        "max-worker-port": 0,
    }
    with TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # its sockets' paths may not be long
        command = [BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
        command += ["--dashboard-host=127.0.0.1", f"--num-cpus={cpus}", f"--temp-dir={folder}"]
        command += ["--object-store-memory=200000000", "--disable-usage-stats"]
        command += [f"--{name}={value}" for name, value in ports.items()]
        with (
            _killed_at_the_end(folder, f"RAY_ADDRESS=127.0.0.1:{port}\0"),
            (Path(folder) / "start.log").open("w") as log,
        ):
            head = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | ENVIRONMENT | (environment or {}), stdout=log, stderr=log
            )
            cluster = RayCluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", Path(folder))
            try:
                _wait(head, cluster)
                yield cluster
            finally:
                head.kill()
                head.wait()


def _wait(head: subprocess.Popen[bytes], cluster: RayCluster) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{cluster.dashboard}/api/version", timeout=2):
                return
        except OSError as error:
            if isinstance(error, HTTPError) and error.code == 401:
                return  # a cluster with RAY_AUTH_MODE=token
            if head.poll() is not None or time.monotonic() > end:
                raise RuntimeError((cluster.folder / "start.log").read_text()) from None
            time.sleep(0.1)


@contextmanager
def _killed_at_the_end(folder: str, mark: str) -> Iterator[None]:
    """All of a cluster is gone after this, or after this process. SIGTERM would do, and take `ray start` over 15 s.

    What is to go is told by a pipe, not by arguments: these would mark the killer itself as one of the cluster's.
    """
    killer = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True, start_new_session=True)
    assert killer.stdin
    killer.stdin.write(f"{folder}\n{mark}\n")
    killer.stdin.flush()
    try:
        yield
    finally:
        killer.stdin.close()
        assert killer.wait(30) == 0


def _kill_when_told() -> None:
    """Reads until the other end of standard input is closed, which is when its process ends, whatever ended it.

    Ray gives some of its processes sessions of their own; a job's process knows the cluster's address alone, and
    outlives it if what watches over it is killed first.
    """
    folder, mark = sys.stdin.read().splitlines()
    while found := pids(folder, mark):  # again, for one that was found may have started another meanwhile
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)  # where pytest was killed, nobody else does


def pids(*marks: str) -> list[int]:
    """Processes whose command line or environment has one of these, such as the cluster's folder; not this process."""
    found = []
    for entry in Path("/proc").iterdir():
        if not re.fullmatch(r"\d+", entry.name) or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
            if any(mark.encode() in words for mark in marks):
                found.append(int(entry.name))
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue
    return found


if __name__ == "__main__":
    _kill_when_told()
