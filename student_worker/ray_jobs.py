"""Training as a job of a Ray cluster: submitted over its job API (REST, on the dashboard's port), followed, stopped."""

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from student_worker.config import LaunchSettings, StatusSettings, StopSettings
from student_worker.errors import ClusterError
from student_worker.job_log import JobLog
from student_worker.travel import variables

T = TypeVar("T")

logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # says each time that a log has ended

_STOPPED = 128 + 15  # exit status, as of a process that SIGTERM ended
_INTERRUPTED = 130
_AWAY = 60.0
"""Seconds without an answer after which a job that is followed is given up; it may go on all the same."""
_SOON = 5.0
"""Seconds that a job may wait for its turn before that is said."""
_POLL = 0.5
_JOB = "preceptor-job"  # in the submission's metadata, as in a query's


def launch_command(settings: LaunchSettings) -> int:
    """Submits and follows; returns the job's exit status, or with --no-wait 0.

    The job's own arguments are `train` alone: all else goes by environment variables, which the dashboard shows without
    their values. Raises ClusterError.
    """
    cluster = _Cluster(settings.address)
    runtime_env: dict[str, Any] = {"env_vars": variables(settings)}
    if settings.working_dir:
        runtime_env["working_dir"] = settings.working_dir
    submission_id = cluster.ask(
        lambda client: client.submit_job(
            entrypoint=shlex.join(["python", "-m", "student_worker", "train"]),
            runtime_env=runtime_env,
            metadata={_JOB: settings.job},
            submission_id=settings.submission_id or None,
            entrypoint_num_cpus=settings.entrypoint_num_cpus or None,
            entrypoint_num_gpus=settings.entrypoint_num_gpus or None,
        )
    )
    if not settings.wait:
        print(submission_id)  # noqa: T201
        return 0
    _tell(f"{submission_id}: submitted to {cluster.url}; Ctrl-C leaves it running")
    try:
        with JobLog(settings.job) as log:
            ended = asyncio.run(_follow(cluster, submission_id, log))
    except KeyboardInterrupt:
        at = f" --address {settings.address}" if settings.address else ""
        _tell(f"\n{submission_id}: goes on; to end it: student-worker launch stop {submission_id}{at}")
        return _INTERRUPTED
    _tell(f"{submission_id}: {_state(ended)}")
    return _exit_status(ended)


def status_command(settings: StatusSettings) -> int:
    """Prints how a job stands; 0 whatever that is. Raises ClusterError."""
    job = _Cluster(settings.address).job(settings.submission_id)
    print(f"{settings.submission_id}: {_state(job)}{_when(job)}")  # noqa: T201
    name = (job.metadata or {}).get(_JOB)
    if name:
        print(f"its spend: job {name}")  # noqa: T201
    return 0


def stop_command(settings: StopSettings) -> int:
    """Ends a job and returns once it has ended; 0 also where it had before. Raises ClusterError."""
    cluster = _Cluster(settings.address)
    if not cluster.job(settings.submission_id).status.is_terminal():
        cluster.ask(lambda client: client.stop_job(settings.submission_id))
        while not cluster.job(settings.submission_id).status.is_terminal():
            time.sleep(_POLL)
    job = cluster.job(settings.submission_id)
    print(f"{settings.submission_id}: {_state(job)}{_when(job)}")  # noqa: T201
    return 0


class _Cluster:
    """Its job server, whose errors become ClusterError with the address and the fix."""

    def __init__(self, address: str) -> None:
        if address:
            # Ray lets the variable win over an argument; what is on our command line has to win.
            os.environ["RAY_API_SERVER_ADDRESS"] = address if "://" in address else f"http://{address}"
        self.url = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "this machine's Ray"
        self.client = self._told(JobSubmissionClient)
        self.url = self.client.get_address()

    def ask(self, question: Callable[[JobSubmissionClient], T]) -> T:
        return self._told(lambda: question(self.client))

    def job(self, submission_id: str) -> JobDetails:
        try:
            return self.client.get_job_info(submission_id)
        except RuntimeError as error:
            if "status code 404" not in str(error):
                raise ClusterError(f"{self.url}: {error}") from error
            raise ClusterError(
                f"{self.url}: knows no job {submission_id!r}; `ray job list` names those that it has"
            ) from error
        except (RayError, OSError, ValueError) as error:
            raise ClusterError(self._said(error)) from error

    def _told(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except (RayError, RuntimeError, OSError, ValueError) as error:
            raise ClusterError(self._said(error)) from error

    def _said(self, error: Exception) -> str:
        hint = ""
        if isinstance(error, ConnectionError):
            hint = "; is a cluster there? Give its dashboard's http://host:port as --address or RAY_API_SERVER_ADDRESS"
        return f"{self.url}: {str(error).rstrip('.')}{hint}"


async def _follow(cluster: _Cluster, submission_id: str, log: JobLog) -> JobDetails:
    """The job, once it has ended. A connection that is lost is made again, and nothing is shown twice."""
    said = ""
    submitted = answered = time.monotonic()
    while True:
        try:
            job = cluster.job(submission_id)
            if job.status == JobStatus.PENDING:
                answered = time.monotonic()
                if answered - submitted > _SOON and job.message and job.message != said:
                    said = job.message
                    _tell(f"{submission_id}: {said}")
            else:
                position = 0
                async for text in cluster.client.tail_job_logs(submission_id):
                    answered = time.monotonic()
                    position = log.read(position, text)
                job = cluster.job(submission_id)
                answered = time.monotonic()
                if job.status.is_terminal():
                    return job
        except (ClusterError, RuntimeError, aiohttp.ClientError, OSError) as error:
            if time.monotonic() - answered > _AWAY:
                raise ClusterError(
                    f"{cluster.url}: no answer for {_AWAY:.0f} s ({error}); job {submission_id} may go on: "
                    f"student-worker launch status {submission_id}"
                ) from error
        await asyncio.sleep(_POLL)


def _exit_status(job: JobDetails) -> int:
    if job.status == JobStatus.STOPPED:
        return _STOPPED
    if job.driver_exit_code is None:  # it never began, or its node is gone
        return 0 if job.status == JobStatus.SUCCEEDED else 1
    code: int = job.driver_exit_code
    return code if code >= 0 else 128 - code  # ended by a signal: as a shell says it


def _state(job: JobDetails) -> str:
    """Such as "succeeded", or "failed with exit status 3"."""
    state: str = job.status.value.lower()
    if job.status != JobStatus.FAILED:
        return state
    if job.driver_exit_code is None:
        return f"{state}: {job.message}"
    return f"{state} with exit status {_exit_status(job)}"


def _when(job: JobDetails) -> str:
    times = ((word, at) for word, at in (("since", job.start_time), ("until", job.end_time)) if at)
    return "".join(f", {word} {datetime.fromtimestamp(at / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC" for word, at in times)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201
