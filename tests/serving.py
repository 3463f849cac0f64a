"""Real servers for the tests: in a thread of this process, or in a process of their own."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from torch import Tensor, nn

from teacher_server.config import ServeSettings
from teacher_server.http_app import HttpApp
from teacher_server.server import RunningServer, teacher_server
from tests.teachers import TINY, save, tiny

ROOT = Path(__file__).parent.parent


def until(condition: Callable[[], object]) -> None:
    """Waits for a condition that another thread or process brings about; a minute, then TimeoutError."""
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.01)


class Gate:
    """Holds a `gated` teacher's forward passes while it is shut."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Semaphore(0)

    @contextmanager
    def shut(self) -> Iterator[None]:
        while self.reached.acquire(blocking=False):
            pass
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()


GATE = Gate()


class Gated(nn.Module):
    """Answers as `tiny` does, once the gate is open; keeps the size of every batch."""

    batches: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        GATE.reached.release()
        if not GATE.open.wait(60):
            raise TimeoutError("the gate stayed shut")
        return self.net(x)


class Doomed(nn.Module):
    """Its device is lost at the first batch of 13."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 13:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return self.net(x)


class Wordy(Doomed):
    """Says very much when it fails, at a batch of 13."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 13:
            raise ValueError("no " * 8334)
        return self.net(x)


class Stuck(Doomed):
    """Never comes back from a batch of 13."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 13:
            threading.Event().wait()
        return self.net(x)


LOADING = threading.Event()
LOADING.set()


def slow() -> nn.Module:
    """Takes until LOADING is set to be made."""
    LOADING.wait(60)
    return tiny()


FACTORIES = {"tiny": tiny, "gated": Gated, "doomed": Doomed, "wordy": Wordy, "stuck": Stuck, "slow": slow}


def arguments(folder: Path, teacher: str = "tiny") -> dict[str, object]:
    """The settings that serve one of FACTORIES on free ports."""
    factory = FACTORIES[teacher]
    weights = save(factory(), folder / f"{teacher}.safetensors", TINY)
    return {
        "model": f"{factory.__module__}:{factory.__name__}",
        "weights": weights,
        "grpc_port": 0,
        "http_port": 0,
        "threads": 1,
    }


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@contextmanager
def _state_of_its_own(settings: dict[str, object]) -> Iterator[dict[str, object]]:
    """A state directory for a server that is given none."""
    with TemporaryDirectory() as folder:
        yield {"state_directory": folder} | settings


@contextmanager
def serving(**given: object) -> Iterator[RunningServer]:
    """A server in a thread of this process; leaving it drains."""
    with _state_of_its_own(given) as settings, _serving(settings) as server:
        yield server


@contextmanager
def _serving(settings: dict[str, object]) -> Iterator[RunningServer]:
    ready: Future[tuple[RunningServer, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        async with teacher_server(ServeSettings(**settings)) as server:
            ready.set_result((server, asyncio.get_running_loop(), stop))
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        server, loop, stop = ready.result(60)
        try:
            yield server
        finally:
            loop.call_soon_threadsafe(stop.set)
    finally:
        thread.join(60)


@contextmanager
def http_serving(app: Callable[[], AbstractAsyncContextManager[HttpApp]]) -> Iterator[int]:
    """What `app()` gives, an HttpApp by itself, entered in a thread of this process; its port."""
    ready: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        try:
            async with app() as entered:
                ready.set_result((entered.port, asyncio.get_running_loop(), stop))
                await stop.wait()
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        port, loop, stop = ready.result(30)
        try:
            yield port
        finally:
            loop.call_soon_threadsafe(stop.set)
    finally:
        thread.join(30)


@contextmanager
def process(
    *module: str, environment: Mapping[str, str] | None = None, within: Sequence[str] = (), **given: object
) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """`teacher-server serve` in a process of its own: (process, gRPC address, HTTP address). Killed when left.

    `module`: another one than teacher_server, with arguments that come before `serve`. `within`: a command that runs
    the one that follows it, and becomes it.
    """
    with _state_of_its_own(given) as settings:
        flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        command = [*within, sys.executable, "-m", *(module or ("teacher_server",)), "serve", *flags]
        with _process(command, environment) as started:
            yield started


@contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str] | None
) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as server:
        try:
            line = server.stdout.readline()
            ready = re.search(r"grpc (\S+), http (\S+),", line)
            if not ready:
                raise RuntimeError(line + server.stderr.read())
            yield server, ready[1], ready[2]
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGKILL)
