"""Queries carry sample numbers; `compute` answers each with a function of its number, so that every mix-up shows.

Nothing here sleeps. Queries submitted before the batcher is entered form batches that can be foretold; a `Gate` lets
one batch through at a time; a delay of a thousand seconds never runs out.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from teacher_server.batcher import Batcher, Computed
from teacher_server.config import BatcherConfig

PATIENCE = 20.0  # seconds until a test gives up; never waited for when all is well


def samples(start: int, stop: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    return {"x": np.arange(start, stop).astype(dtype)[:, None]}


def square(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"logits": inputs["x"].astype(np.float32) ** 2}


def numbers(array: np.ndarray) -> list[int]:
    return array[:, 0].astype(int).tolist()


def logits(future: Future[Computed]) -> list[int]:
    return numbers(future.result(PATIENCE).outputs["logits"])


class Recorder:
    """A compute that keeps the sample numbers of each batch."""

    def __init__(self, compute: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = square) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self._compute = compute

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.batches.append(numbers(inputs["x"]))
        self.threads.add(threading.get_ident())
        return self._compute(inputs)


class Gate(Recorder):
    """Holds each batch until it is let through."""

    def __init__(self, compute: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = square) -> None:
        super().__init__(compute)
        self.entered: queue.Queue[list[int]] = queue.Queue()
        self._go = threading.Semaphore(0)

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.entered.put(numbers(inputs["x"]))
        assert self._go.acquire(timeout=PATIENCE)
        return super().__call__(inputs)

    def arrived(self) -> list[int]:
        """Waits for the next batch to stand at the gate."""
        return self.entered.get(timeout=PATIENCE)

    def let_through(self, batches: int = 1) -> None:
        self._go.release(batches)


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class BusyClock:
    """Every batch takes `step` nanoseconds."""

    def __init__(self, step: int) -> None:
        self.step, self.now = step, 0

    def __call__(self) -> int:
        self.now += self.step
        return self.now


def batcher(compute: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], size: int = 4, **more: Any) -> Batcher:
    knobs = {name: more.pop(name) for name in list(more) if name in BatcherConfig.model_fields}
    return Batcher(BatcherConfig(max_batch_size=size, **knobs), compute, **more)
