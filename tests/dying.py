"""Students that die where they are told to, by SIGKILL: `Mortals` starts one process that has torch loaded, and it
forks one for each run."""

import importlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from student_worker import answer_log, checkpoints, models, state, weights
from student_worker.__main__ import main
from student_worker.data import load
from tests.serving import ROOT

# ---------------------------------------------------------------- a teacher that never answers the same twice


def noisy(**arguments: Any) -> torch.nn.Module:
    """student_worker.models:build, but fresh noise is in every logit of every forward pass."""
    network = models.build(**arguments)
    network.register_forward_hook(lambda module, inputs, logits: logits + 0.1 * torch.randn_like(logits))
    return network


class Drawing(torch.nn.Module):
    """A student that draws from every generator there is."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.network = models.build("cnn-tiny", **arguments)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.dropout(x, 0.1, self.training)
        if self.training:
            x = x * (0.9 + 0.1 * random.random() + 0.1 * float(np.random.rand()))  # noqa: NPY002
        logits: torch.Tensor = self.network(x)
        return logits


# ---------------------------------------------------------------- where to die


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(function: Callable[..., Any], number: int, deed: Callable[..., object]) -> Callable[..., Any]:
    """`function`, that does `deed` with its arguments first when it is called for the `number`th time."""
    calls = iter(range(1, sys.maxsize))

    def dangerous(*given: Any, **named: Any) -> Any:
        if next(calls) == number:
            deed(*given, **named)
        return function(*given, **named)

    return dangerous


def _half(path: Path, content: bytes) -> None:
    path.with_name(f".{path.name}.part").write_bytes(content[: len(content) // 2])
    die()


def _half_a_record(log: answer_log.AnswerLog, request_id: str, record: bytes) -> None:
    with log._lock:
        log._file.seek(0, os.SEEK_END)
        log._file.write(answer_log._framed(record)[: len(record) // 2])
        log._file.flush()
        die()


def _now(*_: object) -> None:
    die()


# Where, and what happens there: (whose attribute, its name, the deed).
POINTS: dict[str, tuple[Any, str, Callable[..., object]]] = {
    "when an answer has come, before it is kept": (answer_log.AnswerLog, "_append", _now),
    "while an answer is written": (answer_log.AnswerLog, "_append", _half_a_record),
    "between the reply and the optimiser's step": (torch.optim.SGD, "step", _now),
    "between the step and its end": (torch.optim.lr_scheduler.OneCycleLR, "step", _now),
    "while the state is written": (state, "write_whole", _half),
    "between the state and the log's rotation": (answer_log.AnswerLog, "rotate", _now),
    "while the log is rotated": (answer_log, "write_whole", _half),
    "while an epoch's weights are written": (weights, "write_whole", _half),
    "before an epoch's state": (checkpoints, "save_state", _now),
}


def _trap(point: str, number: int) -> None:
    owner, name, deed = POINTS[point]
    setattr(owner, name, _before(getattr(owner, name), number, deed))


def _trace(path: str) -> None:
    """A line for each step: the digest of the weights after it."""
    step = torch.optim.SGD.step

    def traced(self: torch.optim.SGD, *given: Any) -> Any:
        result = step(self, *given)
        digest = blake3()
        for group in self.param_groups:
            for parameter in group["params"]:
                digest.update(parameter.detach().contiguous().numpy().tobytes())
        with Path(path).open("a") as file:
            file.write(f"{digest.hexdigest()}\n")
        return result

    torch.optim.SGD.step = traced  # type: ignore[method-assign]


# ---------------------------------------------------------------- the process that forks


def _live(life: dict[str, Any]) -> int:
    said = os.open(life["said"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True)
    if life["trace"]:
        _trace(life["trace"])
    if life["point"]:
        _trap(life["point"], life["number"])
    return main(life["command"])


def _serve() -> None:
    torch.set_num_threads(1)
    # What is imported at its first use takes longer than such a run trains, so the children are born with it.
    load("digits")
    importlib.import_module("student_worker.commands")
    importlib.import_module("torch._dynamo")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 70
            try:
                status = _live(json.loads(line))
            finally:
                os._exit(status)
        _, waited = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(waited)}\n")
        sys.stdout.flush()


class Mortals:
    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process = process
        self._folder = folder

    def __call__(
        self, *command: object, point: str = "", number: int = 0, trace: Path | None = None
    ) -> tuple[int, str]:
        """(exit status, what was said) of `student-worker COMMAND`. Killed at the `number`th time at `point`: -9."""
        said = self._folder / "said"
        life = {
            "command": [str(word) for word in command],
            "point": point,
            "number": number,
            "trace": str(trace or ""),
            "said": str(said),
        }
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(life) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), said.read_text()


@contextmanager
def mortals(folder: Path) -> Iterator[Mortals]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "tests.dying"], cwd=ROOT, **pipes) as process:
        yield Mortals(process, folder)
        process.stdin.close()


if __name__ == "__main__":
    _serve()
