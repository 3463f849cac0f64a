"""What the ledger booked to each trial of a sweep."""

from collections import Counter
from collections.abc import Iterable, Sequence
from time import monotonic, sleep

from protos import teacher_pb2 as pb
from student_worker.client import TeacherClient
from student_worker.sweep import Outcome, Trial

COUNTS = ("asked", "computed", "cached", "coalesced")
_LATE_SECONDS = 10.0
_POLL_SECONDS = 0.5


class Books:
    """What the ledger says of each job, from which an earlier state can be taken away."""

    def __init__(self, lines: Iterable[pb.SpendLine] = ()) -> None:
        self._counts: dict[str, Counter[str]] = {}
        for line in lines:
            counts = self._counts.setdefault(line.job, Counter())
            counts.update({name: int(getattr(line, name)) for name in (*COUNTS, "device_nanoseconds", "flops")})
            counts[f"nanos {line.currency}"] += line.money_nanos

    def since(self, earlier: "Books", job: str) -> Counter[str]:
        """COUNTS, `flops`, `device_nanoseconds` and, by currency, `nanos EUR` of what was spent in between."""
        counts = Counter(self._counts.get(job, Counter()))
        counts.subtract(earlier._counts.get(job, Counter()))
        return counts


def books(teacher: TeacherClient | None) -> Books:
    """The ledger as it is, of all jobs of this tenant; empty without a teacher."""
    return Books(teacher.spend("").lines if teacher else ())


def spent_since(
    before: Books, made: Sequence[Trial], outcomes: Sequence[Outcome], teacher: TeacherClient | None
) -> list[Counter[str]]:
    """What was booked to each trial since `before`. Other replicas may need a moment to post their books."""
    end = monotonic() + _LATE_SECONDS
    while True:
        now = books(teacher)
        spent = [now.since(before, trial.settings.job) for trial in made]
        late = any(outcome.answered > booked["asked"] for outcome, booked in zip(outcomes, spent, strict=True))
        if not late or monotonic() > end:
            return spent
        sleep(_POLL_SECONDS)
