"""What the command line does with its settings: opens what a run needs, reports, closes."""

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec

from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from protos import teacher_pb2 as pb
from student_worker.answer_log import AnswerLog
from student_worker.books import books, spent_since
from student_worker.check import check
from student_worker.checkpoint import checkpoint_path, save_checkpoint
from student_worker.checkpoints import KINDS, PATIENCE, Checkpoints, held
from student_worker.client import TeacherClient
from student_worker.config import (
    CHECKED_SAMPLES,
    CheckSettings,
    CompareSettings,
    TeacherConfig,
    TrainSettings,
)
from student_worker.data import Dataset, load
from student_worker.errors import BudgetSpent
from student_worker.lessons import known_labels
from student_worker.ranks import ALONE, Ranks
from student_worker.state import State, load_state, state_path
from student_worker.sweep import prepare, refuse_earlier, trials
from student_worker.sweep_settings import SweepSettings
from student_worker.train import OnEpoch, OnStep, Progress, train
from student_worker.unix import Distilled

P = ParamSpec("P")
_BUDGET_SPENT = 3  # exit status


def train_command(settings: TrainSettings) -> int:
    """Exit status 3: the run was stopped by a spent budget."""
    if settings.num_workers:
        from student_worker.ray_train import placed  # noqa: PLC0415 - needs the ray extra

        settings = placed(settings)
    with held(settings.output):
        return _train(settings)


def _train(settings: TrainSettings) -> int:
    resumed = _resumed(settings) if settings.resume else None
    _earlier_files(settings, resumed)  # told before the teacher is asked anything
    spent = fingerprint = ""
    if not (resumed or settings.method.startswith("hard")):
        try:
            fingerprint = _check(settings, f"{settings.job}-check", CHECKED_SAMPLES).fingerprint
        except BudgetSpent as error:
            spent = str(error)
    stopping = settings.on_budget_spent == "stop"
    if spent and stopping:
        tell(f"{settings.job}: no step was taken, the teacher's budget is spent: {spent}")
        return _BUDGET_SPENT
    if spent:
        tell(f"{settings.job}: goes on with the labels alone from the first step, the budget is spent: {spent}")
    # A run that has ended needs no teacher, and none of its files is touched.
    if resumed and resumed.finished:
        progress = train(settings, None, resumed=resumed)
    elif settings.num_workers:
        _clear(settings, resumed)
        if resumed and resumed.fingerprint:
            with _client(settings, settings.job, resumed.fingerprint) as teacher:
                teacher.describe()  # where another teacher answers, this fails here, and not on every worker
        from student_worker.ray_train import on_workers  # noqa: PLC0415 - needs the ray extra

        progress = on_workers(settings, spent, fingerprint)
    else:
        progress = _run(settings, spent, resumed)
    print(  # noqa: T201
        f"{settings.job} ({settings.method}): test accuracy {progress.accuracy:.2%} after {progress.steps} steps, "
        f"{progress.asked} samples asked, {progress.seconds:.1f} s; checkpoints in {settings.output}"
    )
    if not progress.budget_spent:
        return 0
    tell(f"{settings.job}: {_ended(progress, settings)}; the teacher's budget is spent: {progress.budget_spent}")
    return _BUDGET_SPENT if stopping else 0


def _ended(progress: Progress, settings: TrainSettings) -> str:
    if settings.on_budget_spent == "stop":
        weights = checkpoint_path(settings.output, progress.epoch)
        where = f"after {progress.steps} of {progress.of_steps} steps, checkpoint in {weights}"
        return f"stopped {where}, and --resume goes on once there is budget"
    return f"learnt from the labels alone from step {progress.taught + 1} of {progress.of_steps} on"


def tell(line: str) -> None:
    """On standard error. Not by print, which Ray Train replaces by one that says everything twice."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def check_command(settings: CheckSettings) -> None:
    _check(settings, settings.job, settings.samples)


def compare_command(settings: CompareSettings) -> None:
    from student_worker.compare import compare  # noqa: PLC0415 - needs the bench extra

    description = _check(settings, f"{settings.job}-check", CHECKED_SAMPLES)
    print(compare(settings, _run, description))  # noqa: T201
    print(f"\nreport: {settings.output / 'report.json'}\nplot:   {settings.output / 'plot.png'}")  # noqa: T201


def sweep_command(settings: SweepSettings) -> int:
    """Exit status 1: a trial failed, or was interrupted; 3: none did, but one was stopped by a spent budget."""
    from student_worker.ray_sweep import run_trials  # noqa: PLC0415 - needs the ray extra
    from student_worker.sweep_report import SweepReport  # noqa: PLC0415 - needs the bench extra

    if settings.token is not None and settings.token_file is None:
        raise ValueError("token: it would have to be sent to the cluster; put it into a file there, for --token-file")
    made = trials(settings)
    refuse_earlier(settings)  # told before the teacher is asked anything
    with ExitStack() as stack:
        teacher, description = None, pb.TeacherDescription()
        if any(trial.asks for trial in made):
            teacher = stack.enter_context(_client(settings, settings.job))
            description = teacher.describe()
            try:
                _check(settings, f"{settings.job}-check", CHECKED_SAMPLES)
            except BudgetSpent as error:
                if settings.on_budget_spent == "stop":
                    tell(f"{settings.job}: no trial was begun, the teacher's budget is spent: {error}")
                    return _BUDGET_SPENT
        before = books(teacher)
        mark, run_trial = prepare(settings, made), partial(_trial, fingerprint=description.fingerprint)
        outcomes = run_trials(settings, made, run_trial, mark)
        spent = spent_since(before, made, outcomes, teacher)
    data = load(settings.dataset, settings.data_directory)
    report = SweepReport(settings, trials=made, outcomes=outcomes, spent=spent, teacher=description, data=data)
    print(report.write())  # noqa: T201
    print(f"\nreport: {settings.output / 'report.json'}\nplot:   {settings.output / 'plot.png'}")  # noqa: T201
    return report.exit_status


def _trial(settings: TrainSettings, *, fingerprint: str, after_step: OnStep, after_epoch: OnEpoch) -> None:
    """One run of a sweep; it goes on where an earlier attempt of the same sweep was killed."""
    with held(settings.output, patience=PATIENCE):
        resumed = _resumed(settings) if settings.resume else None
        if resumed and resumed.finished:
            return
        _clear(settings, resumed)
        run(settings, fingerprint=fingerprint, resumed=resumed, after_step=after_step, after_epoch=after_epoch)


def _check(
    settings: CheckSettings | TrainSettings | CompareSettings | SweepSettings, job: str, samples: int
) -> pb.TeacherDescription:
    """Does the teacher understand the data? Before a run it is booked to another job, so that the run's count is its.

    Unix asks the same for free while it trains; with few labels it would take it many steps to know.
    """
    data = load(settings.dataset, settings.data_directory)
    with _client(settings, job) as teacher:
        print(check(teacher, data, known_labels(settings, data), samples))  # noqa: T201
        return teacher.describe()


def _client(settings: TeacherConfig, job: str, fingerprint: str = "") -> TeacherClient:
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


def _resumed(settings: TrainSettings) -> State | None:
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


def _earlier_files(settings: TrainSettings, resumed: State | None = None) -> list[Path]:
    """Another run's files in the output folder: two runs in one would leave one's late epochs behind the other's.

    The state is the first, for without it nobody takes the rest for a run's. Raises ValueError unless they may be
    overwritten, or are those of the run that is resumed.
    """
    if resumed:
        return []
    states, answers = KINDS
    kinds = [states, "epoch-*", answers, "events.out.tfevents.*"]
    if settings.resume and not settings.overwrite:
        kinds = ["epoch-*"]  # a run that was killed before its first state left none of these, and nothing of use
    earlier = [path for kind in kinds for path in sorted(settings.output.glob(kind))]
    if earlier and not settings.overwrite:
        raise ValueError(
            f"output: {settings.output} holds another run's files; give another --output, or --overwrite, or --resume "
            "to go on with that run"
        )
    return earlier


def _clear(settings: TrainSettings, resumed: State | None) -> None:
    for path in _earlier_files(settings, resumed):
        path.unlink()


def _run(settings: TrainSettings, budget_spent: str = "", resumed: State | None = None) -> Progress:
    _clear(settings, resumed)
    return run(settings, budget_spent=budget_spent, resumed=resumed)


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
        answers = None
        if not settings.method.startswith("hard"):
            fingerprint = resumed.fingerprint if resumed else fingerprint
            client = stack.enter_context(_client(settings, settings.job, fingerprint))
            fingerprint = client.describe().fingerprint  # where another teacher answers, a resumed run fails here
            answers = stack.enter_context(AnswerLog(client, checkpoints.answers))

        on_step, on_epoch, flush = _reports(settings, resumed, stack) if ranks.rank == 0 else (_nothing,) * 3

        def on_checkpoint(state: State) -> None:
            flush()  # or a killed run's curves would have a gap before its state
            checkpoints.save(state, answers)
            after_checkpoint(state)

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
        )


def _both(first: Callable[P, None], then: Callable[P, None]) -> Callable[P, None]:
    def both(*told: P.args, **more: P.kwargs) -> None:
        first(*told, **more)
        then(*told, **more)

    return both


def _nothing(*_: Any) -> None:
    """What the ranks report for which the first one speaks."""


def _reports(
    settings: TrainSettings, resumed: State | None, stack: ExitStack
) -> tuple[
    OnStep,
    OnEpoch,
    Callable[[], None],
]:
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
