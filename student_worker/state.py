"""What a killed run is resumed from: all that decides how it goes on, in one file."""

import io
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import nn

from student_worker.config import TrainSettings
from student_worker.lessons import Lessons
from student_worker.weights import write_whole

_VERSION = 1
_CHECKSUM_BYTES = 16


@dataclass(frozen=True)
class State:
    """A run between two of its steps, in plain values and tensors.

    The tensors are the run's own and change with its next step: save it, or copy it, before. Of several workers on one
    student, `shared` is the same for all, and each has its `own`.
    """

    shared: dict[str, Any]
    own: dict[str, Any]

    @property
    def finished(self) -> bool:
        return bool(self.shared["epoch"] == self.shared["settings"]["epochs"])

    @property
    def progress(self) -> dict[str, Any]:
        """The fields of the last Progress there was; empty before the first epoch's end."""
        progress: dict[str, Any] = self.shared["progress"]
        return progress

    @property
    def fingerprint(self) -> str:
        """Of the teacher that the run began with; empty where it asks none."""
        fingerprint: str = self.shared["fingerprint"]
        return fingerprint

    @property
    def steps(self) -> int:
        """Batches learnt."""
        steps: int = self.own["lessons"]["steps"]
        return steps

    @property
    def unix(self) -> dict[str, Any] | None:
        """What Unix.state_dict() gave; None where labels alone teach."""
        unix: dict[str, Any] | None = self.own["lessons"]["unix"]
        return unix


@dataclass
class Run:
    """What changes while a run goes on: its parts, and how far it is."""

    settings: TrainSettings
    fingerprint: str
    student: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    lessons: Lessons
    epoch: int = 0
    """Epochs that ended."""
    losses: list[float] = field(default_factory=list)
    """Of the batches that this epoch has learnt so far."""
    progress: dict[str, Any] = field(default_factory=dict)
    """Of the last epoch that ended."""
    told: str = ""
    """What the state that was last taken says of the budget's end."""

    def due(self) -> bool:
        """A state is to be taken now: so many steps were taken, or nobody is asked any more, which is to stay so."""
        every = self.settings.checkpoint_steps
        return (every > 0 and self.lessons.steps % every == 0) or self.lessons.budget_spent != self.told

    def end_epoch(self, progress: dict[str, Any]) -> None:
        self.epoch, self.losses, self.progress = self.epoch + 1, [], progress

    def state(self, seconds: float) -> State:
        """As it stands, after so many seconds of training. To be taken after a step, or between epochs."""
        self.told = self.lessons.budget_spent
        return State(
            shared={
                "settings": self.settings.deciding(),
                "fingerprint": self.fingerprint,
                "student": self.student.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "epoch": self.epoch,
                "progress": self.progress,
                "seconds": seconds,
            },
            own={
                "lessons": self.lessons.state_dict(),
                "random": _random_states(),
                "losses": list(self.losses),
                "buffers": dict(self.student.named_buffers()),  # batch norm's are of each worker's own part
            },
        )

    def restore(self, state: State) -> float:
        """Makes it stand where `state` was taken; returns the seconds that the run had taken."""
        shared = state.shared
        self.student.load_state_dict(shared["student"])
        self.optimizer.load_state_dict(shared["optimizer"])
        self.schedule.load_state_dict(shared["schedule"])
        self.epoch, self.losses, self.progress = shared["epoch"], list(state.own["losses"]), shared["progress"]
        for name, buffer in self.student.named_buffers():
            buffer.copy_(state.own["buffers"][name])
        self.fingerprint = shared["fingerprint"]
        self.lessons.load_state_dict(state.own["lessons"])
        self.told = self.lessons.budget_spent
        _set_random_states(state.own["random"])
        seconds: float = shared["seconds"]
        return seconds


def state_path(folder: Path) -> Path:
    """Where a run keeps its state."""
    return folder / "state.pt"


def save_state(path: Path, state: State) -> None:
    """Writes `path`: the new state is there whole, or the old one still is. A file of torch.save, and its checksum."""
    content = io.BytesIO()
    torch.save({"version": _VERSION, "shared": state.shared, "own": state.own}, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue() + _checksum(content.getvalue()))


def load_state(path: Path, settings: TrainSettings) -> State:
    """The state in `path`, on the CPU; nothing in it is unpickled.

    Raises ValueError for a file that is damaged or of another version, and where `settings` would make another run of
    it than the one that it is of.
    """
    saved = path.read_bytes()
    if _checksum(saved[:-_CHECKSUM_BYTES]) != saved[-_CHECKSUM_BYTES:]:
        raise ValueError(
            f"{path} is damaged, or no state of a run; bring a sound one, or begin anew, with --overwrite and without "
            "--resume"
        )
    content = torch.load(io.BytesIO(saved[:-_CHECKSUM_BYTES]), map_location="cpu", weights_only=True)
    if (version := content.get("version")) != _VERSION:
        raise ValueError(
            f"{path} has version {version!r}, this program reads version {_VERSION}: resume with the program that "
            "wrote it, or begin anew, with --overwrite and without --resume"
        )
    state = State(content["shared"], content["own"])
    began, now = state.shared["settings"], settings.deciding()
    changed = [
        f"{name} was {began.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(began.keys() | now.keys())
        if began.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{path} is of a run with other settings: {'; '.join(changed)}. Resume it with its own, or begin another "
            "in another --output"
        )
    return state


def _checksum(content: bytes) -> bytes:
    """torch.load would not notice a flipped bit."""
    return blake3(content).digest(length=_CHECKSUM_BYTES)


def _random_states() -> dict[str, Any]:
    """Of every generator that a student's code may draw from."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - whoever draws from it, it is to go on
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if used else [],
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "python": random.getstate(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(states["python"])
