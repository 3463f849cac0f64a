"""`train --num-workers`: places the training loop on workers of a Ray cluster, and knows nothing else of it.

Ray Train starts the workers and joins them to a torch.distributed process group (gloo on CPUs, NCCL on GPUs); where one
is lost, it starts all of them again, and they go on from the run's own state in the output folder. Ray gets a copy of
that after each epoch. Its own record of checkpoints is behind by up to a poll of its controller when a worker dies,
and an answer that was thrown away in between would have to be asked for again.
"""

import os
import shutil
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

from student_worker.checkpoints import PATIENCE, Checkpoints, held
from student_worker.config import TrainSettings
from student_worker.data import load
from student_worker.errors import TeacherError
from student_worker.models import build
from student_worker.ranks import Ranks, joined
from student_worker.run import run, tell
from student_worker.state import State
from student_worker.train import Progress
from student_worker.travel import absolute_paths, refuse_token

_RAYS_FOLDER = "ray-train"  # in the output folder: what Ray Train keeps of a run


def placed(settings: TrainSettings) -> TrainSettings:
    """The settings as they hold on every node. Raises what the data and the student's factory raise, and ValueError.

    Paths are made absolute, for a worker has a working directory of its own; all nodes must find the same there.
    """
    refuse_token(settings)
    if settings.num_workers > settings.batch_size:
        raise ValueError(f"num_workers: {settings.num_workers} workers cannot share batches of {settings.batch_size}")
    if settings.device.startswith("cuda:"):
        raise ValueError(f"device: {settings.device}: Ray gives each worker its GPU, so give cuda, cpu or auto")
    settings = settings.model_copy(update=absolute_paths(settings))
    # What no worker could do is said here, at once, rather than by each of them after each of their restarts.
    data = load(settings.dataset, settings.data_directory)
    channels, size, _ = data.shape
    build(settings.student, channels=channels, classes=data.classes, size=size, **settings.student_arguments)
    return settings


def on_workers(settings: TrainSettings, budget_spent: str = "", fingerprint: str = "") -> Progress:
    """One run on `settings.num_workers` workers, from the state in the output folder if there is one; where it ended.

    Uses the cluster of RAY_ADDRESS, or one that runs on this machine, or else starts one for itself. Raises the
    teacher's error where one ended the run, ChildProcessError where workers failed more than `max_failures` times.
    """
    ours = not ray.is_initialized()
    if ours:
        ray.init()
    try:
        return _fitted(settings, budget_spent, fingerprint)
    finally:
        if ours:
            ray.shutdown()


def _fitted(settings: TrainSettings, budget_spent: str, fingerprint: str) -> Progress:
    gpus = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    use_gpu = settings.device == "cuda" or (settings.device == "auto" and gpus >= settings.num_workers)
    if settings.sync_batch_norm and not use_gpu:
        raise ValueError("sync_batch_norm: torch has it for GPUs only, and these workers have none")
    # The state in the output folder is the run's; what an earlier start left with Ray would be taken for this one's.
    if (settings.output / _RAYS_FOLDER).exists():
        shutil.rmtree(settings.output / _RAYS_FOLDER)
    trainer = ray.train.torch.TorchTrainer(
        _worker,  # type: ignore[arg-type]  # its result is Result.return_value
        train_loop_config={
            # All fields but those that hold for the machine of the command alone; none of them is a secret.
            "settings": settings.model_dump(mode="json", exclude={"config"}) | {"config": None, "token": None},
            "budget_spent": budget_spent,
            "fingerprint": fingerprint,
            "use_gpu": use_gpu,
            "code": str(Path.cwd()),
        },
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=_RAYS_FOLDER,
            storage_path=str(settings.output),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        raise ChildProcessError(_said(error)) from error
    if "failed" in result.return_value:
        raise TeacherError(result.return_value["failed"])
    return Progress(**result.return_value["progress"])


def _said(error: TrainingFailedError) -> str:
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    said = [f"worker {rank}: {str(failure).strip().splitlines()[-1]}" for rank, failure in sorted(failures.items())]
    return f"the workers failed more often than max_failures allows; at last {'; '.join(said) or error}"


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs, anew after each loss of one."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as the command line does
    if config["use_gpu"]:
        import torch  # noqa: PLC0415

        torch.cuda.set_device(ray.train.torch.get_device())
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that `auto` is what the process group was made for
    if config["code"] not in sys.path:
        sys.path.append(config["code"])
    settings = TrainSettings(**config["settings"])
    with joined() as ranks, held(settings.output, f".lock-rank{ranks.rank}", PATIENCE):
        try:
            progress = _run(settings, config, ranks)
        except TeacherError as error:
            if not ranks.all_raise(error):
                raise
            # It would come again. A worker that raises is started anew; so this is a result.
            return {"failed": f"{error} ({'; '.join(getattr(error, '__notes__', []))})"}
    return {"progress": asdict(progress)}


def _run(settings: TrainSettings, config: dict[str, Any], ranks: Ranks) -> Progress:
    checkpoints = Checkpoints(settings, ranks)
    resumed = checkpoints.load()
    who = f"worker {ranks.rank} of {settings.num_workers}, process {os.getpid()} on {socket.gethostname()}"
    tell(f"{settings.job}: {who}, {f'goes on after step {resumed.steps}' if resumed else 'begins'}")
    reported = resumed.shared["epoch"] if resumed else 0

    def after_checkpoint(state: State) -> None:
        nonlocal reported
        if state.shared["epoch"] == reported:
            return
        reported = state.shared["epoch"]
        with TemporaryDirectory() as folder:
            shutil.copy(checkpoints.newest(state), folder)
            ray.train.report(state.progress, checkpoint=Checkpoint.from_directory(folder))

    return run(
        settings,
        budget_spent=config["budget_spent"],
        fingerprint=config["fingerprint"],
        resumed=resumed,
        ranks=ranks,
        after_checkpoint=after_checkpoint,
    )
