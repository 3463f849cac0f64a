"""What the command line does with its settings: opens what a run needs, reports, closes."""

from contextlib import ExitStack
from functools import partial

from protos import teacher_pb2 as pb
from student_worker.check import check
from student_worker.checkpoints import PATIENCE, held
from student_worker.config import (
    CHECKED_SAMPLES,
    CheckSettings,
    CompareSettings,
    TrainSettings,
)
from student_worker.data import load
from student_worker.errors import BudgetSpent
from student_worker.lessons import known_labels
from student_worker.run import clear, client_of, earlier_files, earlier_state, run, tell
from student_worker.state import State
from student_worker.sweep import prepare, refuse_earlier, trials
from student_worker.sweep_settings import SweepSettings
from student_worker.sweep_spend import books, spent_since
from student_worker.train import OnEpoch, OnStep, Progress, train
from student_worker.travel import refuse_token
from student_worker.weights import checkpoint_path

_BUDGET_SPENT = 3  # exit status


def train_command(settings: TrainSettings) -> int:
    """Exit status 3: the run was stopped by a spent budget."""
    if settings.num_workers:
        from student_worker.ray_train import placed  # noqa: PLC0415 - needs the ray extra

        settings = placed(settings)
    with held(settings.output):
        return _train(settings)


def _train(settings: TrainSettings) -> int:
    resumed = earlier_state(settings) if settings.resume else None
    earlier_files(settings, resumed)  # told before the teacher is asked anything
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
        clear(settings, resumed)
        if resumed and resumed.fingerprint:
            with client_of(settings, settings.job, resumed.fingerprint) as teacher:
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

    refuse_token(settings)
    made = trials(settings)
    refuse_earlier(settings)  # told before the teacher is asked anything
    with ExitStack() as stack:
        teacher, description = None, pb.TeacherDescription()
        if any(trial.asks for trial in made):
            teacher = stack.enter_context(client_of(settings, settings.job))
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
        resumed = earlier_state(settings) if settings.resume else None
        if resumed and resumed.finished:
            return
        clear(settings, resumed)
        run(settings, fingerprint=fingerprint, resumed=resumed, after_step=after_step, after_epoch=after_epoch)


def _check(
    settings: CheckSettings | TrainSettings | CompareSettings | SweepSettings, job: str, samples: int
) -> pb.TeacherDescription:
    """Does the teacher understand the data? Before a run it is booked to another job, so that the run's count is its.

    Unix asks the same for free while it trains; with few labels it would take it many steps to know.
    """
    data = load(settings.dataset, settings.data_directory)
    with client_of(settings, job) as teacher:
        print(check(teacher, data, known_labels(settings, data), samples))  # noqa: T201
        return teacher.describe()


def _run(settings: TrainSettings, budget_spent: str = "", resumed: State | None = None) -> Progress:
    clear(settings, resumed)
    return run(settings, budget_spent=budget_spent, resumed=resumed)
