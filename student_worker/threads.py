"""Threads for calls that may hang."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_Entry = tuple["Future[Any]", Callable[[], Any]]


class DaemonPool:
    """As a ThreadPoolExecutor, but of daemon threads: a call that hangs cannot keep the program from ending."""

    def __init__(self, threads: int, name: str) -> None:
        self._work: SimpleQueue[_Entry | None] = SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._threads = [
            threading.Thread(target=_serve, args=(self._work,), name=f"{name}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], _Result]) -> "Future[_Result]":
        """Runs it with the caller's context variables, of which his active span is one. After close() the future is
        cancelled. Raises RuntimeError in a forked child, where no thread would run."""
        if os.getpid() != self._process:
            raise RuntimeError("this client or Unix was made before the process forked; make one in the child")
        future: Future[_Result] = Future()
        with self._lock:
            if not self._closed:
                self._work.put((future, partial(copy_context().run, work)))
                return future
        future.cancel()
        return future

    def close(self) -> None:
        """Cancels what has not begun, and waits for nobody: a thread ends when its call does."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            while (entry := self._work.get_nowait()) is not None:
                entry[0].cancel()
        except Empty:
            pass
        for _ in self._threads:
            self._work.put(None)


def _serve(work: "SimpleQueue[_Entry | None]") -> None:
    while (entry := work.get()) is not None:
        future, call = entry
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to whoever waits
                future.set_exception(error)
        del entry, future, call  # or an idle thread would keep the last answer alive
