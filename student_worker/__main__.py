"""student-worker: the command line. Torch is imported only once the arguments are known to be good."""

import os
import sys
from collections.abc import Callable
from typing import Any

from protos.settings import Command, run_command
from student_worker.config import CheckSettings, CompareSettings, TrainSettings
from student_worker.sweep_settings import SweepSettings


def _runs(name: str) -> Callable[[Any], int]:
    def run(settings: Any) -> int:
        try:
            from student_worker import commands
            from student_worker.data import DataError
            from student_worker.errors import TeacherError
        except ModuleNotFoundError as error:
            print(f"student-worker: {error}; install Preceptor with its [student] extra", file=sys.stderr)
            return 1
        try:
            status: int = getattr(commands, name)(settings) or 0
        except ModuleNotFoundError as error:
            extra = "ray" if (error.name or "").partition(".")[0] == "ray" else "bench"
            print(f"student-worker: {error}; Preceptor's [{extra}] extra brings what this needs", file=sys.stderr)
            return 1
        except (TeacherError, DataError, ValueError, TypeError, ArithmeticError, ImportError, OSError) as error:
            print(f"student-worker: {error}", file=sys.stderr)
            return 1
        return status

    return run


COMMANDS: dict[str, Command] = {
    "train": (TrainSettings, _runs("train_command")),
    "check": (CheckSettings, _runs("check_command")),
    "compare": (CompareSettings, _runs("compare_command")),
    "sweep": (SweepSettings, _runs("sweep_command")),
}


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our own errors say it; gRPC's log repeats it
    try:
        return run_command("student-worker", COMMANDS, argv)
    except KeyboardInterrupt:
        print(
            "\nstudent-worker: interrupted; checkpoints of epochs that ended stay, and train --resume goes on",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
