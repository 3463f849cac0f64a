"""student-worker: the command line. Torch is imported only once the arguments are known to be good."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from protos.settings import Command, run_command
from student_worker.config import (
    CheckSettings,
    CompareSettings,
    LaunchSettings,
    StatusSettings,
    StopSettings,
    TrainSettings,
)
from student_worker.errors import ClusterError
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
            print(f"student-worker: {error}; install Preceptor with its [{extra}] extra", file=sys.stderr)
            return 1
        except (TeacherError, DataError, ValueError, TypeError, ArithmeticError, ImportError, OSError) as error:
            print(f"student-worker: {error}", file=sys.stderr)
            return 1
        return status

    return run


def _asks_a_cluster(name: str) -> Callable[[Any], int]:
    """Of ray_jobs: what runs here needs neither torch nor a teacher."""

    def run(settings: Any) -> int:
        try:
            from student_worker import ray_jobs
        except ModuleNotFoundError as error:
            print(f"student-worker: {error}; install Preceptor with its [student] and [ray] extras", file=sys.stderr)
            return 1
        try:
            status: int = getattr(ray_jobs, name)(settings)
        except ClusterError as error:
            print(f"student-worker: {error}", file=sys.stderr)
            return 1
        return status

    return run


COMMANDS: dict[str, Command] = {
    "train": (TrainSettings, _runs("train_command")),
    "check": (CheckSettings, _runs("check_command")),
    "compare": (CompareSettings, _runs("compare_command")),
    "sweep": (SweepSettings, _runs("sweep_command")),
    "launch": (LaunchSettings, _asks_a_cluster("launch_command")),
    "launch status": (StatusSettings, _asks_a_cluster("status_command")),
    "launch stop": (StopSettings, _asks_a_cluster("stop_command")),
}


def _told_by_ray(variable: str) -> bool:
    """Whether an environment variable was set by the description of the Ray job that we are, which is no secret."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return variable in (job.get("runtime_env") or {}).get("env_vars", {})


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our own errors say it; gRPC's log repeats it
    if _told_by_ray("STUDENT_TOKEN"):
        print(
            "student-worker: STUDENT_TOKEN came with the Ray job's runtime_env, where all who reach the cluster's "
            "dashboard can read it: revoke that token, and give --token-file, the path of a file on its nodes",
            file=sys.stderr,
        )
        return 2
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
