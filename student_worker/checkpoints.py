"""Where a run keeps its state and its answers: one state at a time, of all its ranks together."""

from pathlib import Path

from student_worker.answer_log import AnswerLog
from student_worker.config import TrainSettings
from student_worker.ranks import ALONE, Ranks
from student_worker.state import State, load_state, save_state, state_path

KINDS = ("state*.pt", "answers*.log")
"""What its files are called."""


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
        """This rank's, on the CPU; None where there is none. Raises ValueError as load_state does."""
        if not (path := state_path(self._folder)).exists():
            return None
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
        if answers is not None and state.unix is not None:
            answers.rotate(state.unix)
        if self._name:
            for part in set(self._folder.glob(f"state{self._name}-*.pt")) - {self._own(state)}:
                part.unlink()

    def newest(self, state: State) -> Path:
        """The file of this rank that `save(state)` wrote."""
        return self._own(state) if self._name else state_path(self._folder)

    def _own(self, state: State) -> Path:
        # The end of an epoch is another state than the one behind its last step.
        return self._folder / f"state{self._name}-{state.shared['epoch']}-{state.steps}.pt"
