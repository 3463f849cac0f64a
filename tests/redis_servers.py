"""Redis servers of the tests' own: started on a free port or a socket, ended by their id."""

import asyncio
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr
from redis import Redis
from redis.exceptions import AuthenticationError
from redis.exceptions import ConnectionError as NoConnection

from teacher_server.config import StoreConfig
from teacher_server.embedded import socket_url, valkey_binary
from tests.serving import until

DEBIAN = Path("/usr/bin/redis-server")  # 7.0: without WAITAOF, with TLS
AOF = ("--appendonly", "yes", "--appendfsync", "everysec")
needs_debian = pytest.mark.skipif(not DEBIAN.exists(), reason="no redis-server; apt-get install redis-server")


class RedisServer:
    """A server with its socket and files in `folder`; `url` reaches it while inside `running`."""

    def __init__(self, url: str, folder: Path, command: list[str]) -> None:
        self.url = url
        self._folder = folder
        self._command = command
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, cwd=self._folder, stdout=subprocess.DEVNULL)
        try:
            until(self._answers)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"{self._command[0]} ended with {self.process.returncode}")
        with Redis.from_url(self.url) as client:
            try:
                return bool(client.ping())
            except AuthenticationError:
                return True
            except NoConnection:
                return False


@contextmanager
def running(folder: Path, *options: str, binary: Path | None = None) -> Iterator[RedisServer]:
    """The bundled Valkey, or another binary, without persistence unless told by its options."""
    defaults = ["--port", "0", "--save", "", "--loglevel", "warning"]
    command = [str(binary or valkey_binary()), *defaults, "--unixsocket", "redis.sock", *options]
    with socket_url(folder, "redis") as url:
        server = RedisServer(url, folder, command)
        try:
            yield server
        finally:
            server.kill()


def config(folder, **urls):
    return StoreConfig(state_directory=folder, **{name: SecretStr(url) for name, url in urls.items()})


def ended(pid: int) -> bool:
    """Whether no process of that id runs; one that nobody has waited for counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def eventually(condition: Callable[[], object]) -> None:
    """`until` for a condition that this event loop brings about."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - any condition, and few of them have an event
            await asyncio.sleep(0.005)
