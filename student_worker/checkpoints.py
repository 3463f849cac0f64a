"""Where a run keeps its state and its answers: one state at a time, of all its ranks together."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from student_worker.answer_log import AnswerLog
from student_worker.config import TrainSettings
from student_worker.ranks import ALONE, Ranks
from student_worker.state import State, load_state, save_state, state_path

KINDS = ("state*.pt", "answers*.log")
"""What its files are called."""
PATIENCE = 60.0
"""Seconds that what takes the place of a lost process waits for it to be gone, and for files of other machines."""


@contextmanager
def held(folder: Path, name: str = ".lock", patience: float = 0.0) -> Iterator[None]:
    """No other process is in a block of the same `folder` and `name` meanwhile; whoever is killed there lets go.

    Two that go on with one run would cut off each other's answers. Raises ValueError where one still is in there after
    `patience` seconds. File systems that know no locks hold nobody.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, end = folder / name, time.monotonic() + patience
    while True:
        with path.open("a+") as file:
            if not _locked(file):
                if time.monotonic() > end:
                    file.seek(0)
                    raise ValueError(
                        f"output: in {folder} another run is at work, {file.read() or 'of an unknown process'}; wait "
                        "until it has ended, or give another --output"
                    )
                time.sleep(0.1)
            elif _is(path, file):  # else whoever had it removed it
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


def _is(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


class Checkpoints:
    """The state of one run in a folder that all its ranks see.

    `state.pt` is rank 0's, with what all share, and its writing is what makes a new state the run's. Beforehand the
    other ranks have written their own parts under a name that says which state they belong to, and until afterwards
    nobody removes the part, or an answer, that the state before needs: whichever rank is killed whenever, the newest
    `state.pt` finds its parts and their answers.
    """

    def __init__(self, settings: TrainSettings, ranks: Ranks = ALONE) -> None:
        self._settings, self._ranks = settings, ranks
        self._folder = settings.output
        self._name = f"-rank{ranks.rank}" if ranks.rank else ""

    @property
    def answers(self) -> Path:
        """Of this rank's log of answers."""
        return self._folder / f"answers{self._name}.log"

    def load(self) -> State | None:
        """This rank's, on the CPU; None where there is none. All ranks call it.

        Raises ValueError as load_state does, and on every rank where some see a state and others none.
        """
        path = state_path(self._folder)
        (there,) = self._ranks.sums(path.exists())
        if not there:
            return None
        if there < self._ranks.world:
            raise ValueError(
                f"output: {there:.0f} of {self._ranks.world} workers see {path}; give an --output that all nodes share"
            )
        state = load_state(path, self._settings)
        return State(state.shared, load_state(self._own(state), self._settings).own) if self._name else state

    def save(self, state: State, answers: AnswerLog | None) -> None:
        """All ranks call it at the same step; a rank that has returned will find this state or a later one."""
        if self._name:
            save_state(self._own(state), State({"settings": state.shared["settings"]}, state.own))
        self._ranks.wait()
        if not self._name:
            save_state(state_path(self._folder), state)
        self._ranks.wait()
        self._see(state_path(self._folder))
        if answers is not None and state.unix is not None:
            answers.rotate(state.unix)
        if self._name:
            for part in set(self._folder.glob(f"state{self._name}-*.pt")) - {self._own(state)}:
                part.unlink()

    def newest(self, state: State) -> Path:
        """The file of this rank that `save(state)` wrote."""
        return self._own(state) if self._name else state_path(self._folder)

    def _see(self, path: Path) -> None:
        """Raises ValueError unless this rank sees what rank 0 wrote: a run in several folders could not be resumed."""
        end = time.monotonic() + PATIENCE
        while not path.exists():  # a network's file system may say for a while what it said before
            if time.monotonic() > end:
                raise ValueError(
                    f"output: rank 0 wrote {path}, which is not there on {socket.gethostname()}; give an --output that "
                    "all nodes share"
                )
            time.sleep(0.1)

    def _own(self, state: State) -> Path:
        # The end of an epoch is another state than the one behind its last step.
        return self._folder / f"state{self._name}-{state.shared['epoch']}-{state.steps}.pt"
