"""student-worker: the command line. Torch is imported only once the arguments are known to be good."""

import sys
from collections.abc import Callable
from typing import Any

from protos.settings import Command, run_command
from student_worker.config import CheckSettings, CompareSettings, TrainSettings


def _runs(name: str) -> Callable[[Any], int]:
    def run(settings: Any) -> int:
        from student_worker import commands
        from student_worker.data import DataError
        from student_worker.errors import TeacherError

        try:
            getattr(commands, name)(settings)
        except KeyboardInterrupt:
            print("\nstudent-worker: interrupted; the last epoch's checkpoint stays", file=sys.stderr)
            return 130
        except (TeacherError, DataError, ValueError, TypeError, ArithmeticError, ImportError, OSError) as error:
            print(f"student-worker: {error}", file=sys.stderr)
            return 1
        return 0

    return run


COMMANDS: dict[str, Command] = {
    "train": (TrainSettings, _runs("train_command")),
    "check": (CheckSettings, _runs("check_command")),
    "compare": (CompareSettings, _runs("compare_command")),
}


def main(argv: list[str] | None = None) -> int:
    return run_command("student-worker", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
