"""A Ray of the tests' own, on loopback: started from the command line as users do, ended by its own process group."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
        with (Path(folder) / "start.log").open("w+") as log:
            head = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | ENVIRONMENT | (environment or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                cluster = RayCluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", Path(folder))
                _wait(head, cluster)
                yield cluster
            finally:
                _end(head, folder)


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


def _end(head: subprocess.Popen[bytes], folder: str) -> None:
    """All processes that belong to the cluster, by pid: Ray gives some of them sessions of their own."""
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(15)
    except subprocess.TimeoutExpired:
        head.kill()
    for pid in pids(folder):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    head.wait()


def pids(folder: str | Path) -> list[int]:
    """Processes whose command line, or environment, names the cluster's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if not re.fullmatch(r"\d+", entry.name) or int(entry.name) == os.getpid():
            continue
        try:
            if str(folder).encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue
    return found
