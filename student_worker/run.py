"""One training run, or one rank's part of it: its teacher, its files and what it says; train.py has the loop itself."""

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, ParamSpec

from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from protos import teacher_pb2 as pb
from student_worker.answer_log import AnswerLog
from student_worker.checkpoints import KINDS, Checkpoints
from student_worker.client import TeacherClient
from student_worker.config import TeacherConfig, TrainSettings
from student_worker.data import Dataset
from student_worker.metrics import Metrics
from student_worker.ranks import ALONE, Ranks
from student_worker.state import State, load_state, state_path
from student_worker.train import OnEpoch, OnStep, Progress, train
from student_worker.unix import Distilled
from student_worker.weights import save_checkpoint

P = ParamSpec("P")


def run(
    settings: TrainSettings,
    *,
    budget_spent: str = "",
    fingerprint: str = "",
    resumed: State | None = None,
    ranks: Ranks = ALONE,
    after_step: OnStep = lambda *_: None,
    after_epoch: OnEpoch = lambda *_: None,
    after_checkpoint: Callable[[State], None] = lambda _: None,
) -> Progress:
    """One training run, or one rank's part of it, with its teacher, its checkpoints and what it reports.

    `fingerprint`, or else that of the state `resumed`, is the teacher's; empty = of the one that answers now.
    """
    checkpoints = Checkpoints(settings, ranks)
    with ExitStack() as stack:
        client = answers = metrics = None
        if not settings.method.startswith("hard"):
            fingerprint = resumed.fingerprint if resumed else fingerprint
            client = stack.enter_context(client_of(settings, settings.job, fingerprint))
            fingerprint = client.describe().fingerprint  # where another teacher answers, a resumed run fails here
        if settings.exports_metrics:  # left after the others, for it may wait at the end
            metrics = stack.enter_context(_metrics(settings, client, resumed, ranks))
        if client is not None:
            answers = stack.enter_context(AnswerLog(client, checkpoints.answers))

        on_step, on_epoch, flush = _reports(settings, resumed, stack) if ranks.rank == 0 else (_nothing,) * 3

        def on_checkpoint(state: State) -> None:
            flush()  # or a killed run's curves would have a gap before its state
            checkpoints.save(state, answers)
            after_checkpoint(state)
            if metrics:
                metrics.restart_clock()

        if metrics:
            after_step, after_epoch = (
                _both(_counted(metrics), after_step),
                _both(_evaluated(metrics, ranks), after_epoch),
            )
        return train(
            settings,
            answers,
            budget_spent=budget_spent,
            fingerprint=fingerprint,
            resumed=resumed,
            ranks=ranks,
            on_step=_both(on_step, after_step),
            on_epoch=_both(on_epoch, after_epoch),
            on_checkpoint=on_checkpoint,
            observer=metrics,
        )


def client_of(settings: TeacherConfig, job: str, fingerprint: str = "") -> TeacherClient:
    return TeacherClient(
        settings.teacher_address,
        job=job,
        token=settings.bearer_token(),
        tls=settings.tls,
        ca_file=settings.tls_ca_file,
        certificate_file=settings.tls_certificate_file,
        key_file=settings.tls_key_file,
        teacher=settings.teacher_name,
        fingerprint=fingerprint,
        timeout=settings.teacher_timeout,
        cache_namespace=settings.cache_namespace,
    )


def earlier_state(settings: TrainSettings) -> State | None:
    """What is to be gone on with, which is told in any case. Raises ValueError where it does not fit the settings."""
    path = state_path(settings.output)
    if not path.exists():
        tell(f"{settings.job}: nothing to resume, there is no {path}; begins")
        return None
    state = load_state(path, settings)
    if state.finished:
        tell(f"{settings.job}: had ended already, with {state.steps} steps")
    else:
        tell(f"{settings.job}: goes on after step {state.steps}")
    return state


def earlier_files(settings: TrainSettings, resumed: State | None = None) -> list[Path]:
    """Another run's files in the output folder: two runs in one would leave one's late epochs behind the other's.

    `state.pt` is the first, for without it nobody takes the rest for a run's. Raises ValueError unless they may be
    overwritten, or are those of the run that is resumed.
    """
    if resumed:
        return []
    states, answers = KINDS
    kinds = [states, "epoch-*", answers, "events.out.tfevents.*"]
    if settings.resume and not settings.overwrite:
        kinds = ["epoch-*"]  # a run that was killed before its first state left none of these, and nothing of use
    earlier = [path for kind in kinds for path in sorted(settings.output.glob(kind), reverse=True)]
    if earlier and not settings.overwrite:
        raise ValueError(
            f"output: {settings.output} holds another run's files; give another --output, or --overwrite, or --resume "
            "to go on with that run"
        )
    return earlier


def clear(settings: TrainSettings, resumed: State | None) -> None:
    for path in earlier_files(settings, resumed):
        path.unlink()


def _metrics(settings: TrainSettings, client: TeacherClient | None, resumed: State | None, ranks: Ranks) -> Metrics:
    about = {"method": settings.method, "dataset": settings.dataset, "student": settings.student}
    if settings.method == "unix":
        about |= {"strategy": settings.strategy, "mixing": settings.mixing}
    return Metrics(
        None,
        client,
        job=settings.job,
        rank=ranks.rank,
        port=settings.metrics_port or 0,
        targets=settings.metrics_targets,
        about=about,
        steps_before=resumed.steps if resumed else 0,
        say=tell,
    )


def _counted(metrics: Metrics) -> OnStep:
    def on_step(_step: int, steps: int, loss: float, _b: Distilled) -> None:
        metrics.planned_steps = steps
        metrics.step(loss)  # a stand-in's 0 too: the batch's loss is the mean over all ranks

    return on_step


def _evaluated(metrics: Metrics, ranks: Ranks) -> OnEpoch:
    def on_epoch(progress: Progress, _student: nn.Module, _data: Dataset) -> None:
        if ranks.rank == 0:
            metrics.accuracy(progress.accuracy)

    return on_epoch


def _both(first: Callable[P, None], then: Callable[P, None]) -> Callable[P, None]:
    def both(*told: P.args, **more: P.kwargs) -> None:
        first(*told, **more)
        then(*told, **more)

    return both


def _nothing(*_: Any) -> None:
    """What the ranks report for which the first one speaks."""


def _reports(
    settings: TrainSettings, resumed: State | None, stack: ExitStack
) -> tuple[OnStep, OnEpoch, Callable[[], None]]:
    """What a run does after a step and after an epoch: event files, weights, a progress bar on standard error.

    The third writes to the event files what has been told so far.
    """
    # disable=None: a bar on a terminal, a line an epoch in a log.
    bar = stack.enter_context(tqdm(desc=settings.job, unit="step", disable=None, dynamic_ncols=True))
    # What the killed run had drawn beyond its last state is drawn again.
    events = SummaryWriter(settings.output, purge_step=resumed.steps + 1 if resumed else None)
    stack.callback(events.close)

    def on_step(step: int, steps: int, loss: float, b: Distilled) -> None:
        bar.total = steps
        bar.update(step - bar.n)
        events.add_scalar("train/loss", loss, step)
        events.add_scalar("unix/share", b.share.mean().item(), step)
        for budget in b.budgets:
            events.add_scalar(f"teacher/budget_left/{_kind(budget)}", budget.left, step)

    def on_epoch(progress: Progress, student: nn.Module, data: Dataset) -> None:
        bar.set_postfix(epoch=progress.epoch, accuracy=f"{progress.accuracy:.3f}")
        events.add_scalar("test/accuracy", progress.accuracy, progress.steps)
        events.add_scalar("teacher/asked", progress.asked, progress.steps)
        events.add_scalar("teacher/computed", progress.computed, progress.steps)
        record = asdict(progress) | {"settings": settings.model_dump(mode="json")}
        save_checkpoint(settings.output, progress.epoch, student, data, record)
        if bar.disable:
            loss = math.nan if progress.loss is None else progress.loss
            tell(
                f"{settings.job}: epoch {progress.epoch}/{settings.epochs}, step {progress.steps}, "
                f"loss {loss:.4f}, accuracy {progress.accuracy:.4f}, {progress.seconds:.0f} s"
            )

    return on_step, on_epoch, events.flush


def _kind(budget: pb.Budget) -> str:
    """Such as tenant_samples_month: apart from any other budget that one query draws on."""
    return "_".join(
        name.partition("_")[2].lower()
        for name in (
            pb.Budget.Owner.Name(budget.owner),
            pb.Budget.Unit.Name(budget.unit),
            pb.Budget.Period.Name(budget.period),
        )
    )


def tell(line: str) -> None:
    """On standard error. Not by print, which Ray Train replaces by one that says everything twice."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
