"""A sweep's trials on a Ray cluster, by Ray Tune: it places them, counts their failures, and ends those that lag."""

import logging
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from socket import gethostname
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from torch import nn

from student_worker.config import TrainSettings
from student_worker.data import Dataset
from student_worker.sweep import MARK, Distinct, Outcome, Trial, split_accuracy
from student_worker.sweep_settings import SweepSettings
from student_worker.train import OnEpoch, OnStep, Progress
from student_worker.unix import Distilled


class Run(Protocol):
    """One training run, with its files; resumed where the settings say so and there is a state."""

    def __call__(self, settings: TrainSettings, *, after_step: OnStep, after_epoch: OnEpoch) -> None: ...


def run_trials(settings: SweepSettings, made: list[Trial], run: Run, mark: str) -> list[Outcome]:
    """Runs each trial in a process of the cluster; what became of each, in their order.

    A trial that fails ends no other. `run` must be a function of a module that the nodes can import. `mark` is what
    `prepare` wrote into the trials' folders.
    """
    scheduler = None
    if settings.asha:
        scheduler = ASHAScheduler(
            time_attr="epoch",
            max_t=settings.epochs,
            grace_period=min(settings.asha_grace, settings.epochs),
            reduction_factor=settings.asha_reduction,
        )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial's traceback is in its error.txt
    ray.init(log_to_driver=False)  # what trials write themselves stays in Ray's logs; _Told says how they do
    try:
        places = {"CPU": settings.cpus_per_trial, "GPU": settings.gpus_per_trial}
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trial, made=made, run=run, mark=mark), places),
            param_space={"trial": tune.grid_search([{"number": t.number, **t.values} for t in made])},
            tune_config=tune.TuneConfig(
                metric="validation",
                mode="max",
                scheduler=scheduler,
                max_concurrent_trials=settings.concurrent_trials or None,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(settings.output.absolute()),
                failure_config=tune.FailureConfig(max_failures=settings.max_failures),
                callbacks=[_Told(made)],
                verbose=0,
            ),
        )
        with redirect_stdout(sys.stderr):  # what Tune tells meanwhile; standard output is the report's
            results = tuner.fit()
        found = [results[place] for place in range(len(results))]
    finally:
        ray.shutdown()
    outcomes = {result.config["trial"]["number"]: _outcome(result) for result in found if result.config}
    return [outcomes.get(trial.number, Outcome()) for trial in made]


def _name(trial: Any) -> str:
    return f"trial-{trial.config['trial']['number']:04d}"


class _Told(tune.Callback):
    """A line on standard error for each trial's epoch, and for its end."""

    def __init__(self, made: list[Trial]) -> None:
        self._made = made

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:  # noqa: ARG002
        epochs = self._train(trial).epochs
        self._tell(trial, f"epoch {result['epoch']}/{epochs}, validation accuracy {result['validation']:.4f}")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:  # noqa: ARG002
        self._tell(trial, "failed")

    def _train(self, trial: Any) -> TrainSettings:
        number: int = trial.config["trial"]["number"]
        return self._made[number].settings

    def _tell(self, trial: Any, what: str) -> None:
        print(f"{self._train(trial).job}: {what}", file=sys.stderr, flush=True)  # noqa: T201


def _trial(config: dict[str, Any], *, made: list[Trial], run: Run, mark: str) -> None:
    trial = made[config["trial"]["number"]]
    folder, distinct = trial.settings.output, Distinct()
    if not (folder / MARK).is_file() or (folder / MARK).read_text() != mark:
        raise ValueError(f"output: {folder} is not there on {gethostname()}; give an --output that all nodes share")

    def on_step(step: int, _steps: int, _loss: float, b: Distilled) -> None:
        if not trial.mixes:
            distinct.add(step, b)

    def on_epoch(progress: Progress, student: nn.Module, data: Dataset) -> None:
        alone = progress.asked if trial.mixes else distinct.known
        validation, test = split_accuracy(progress.accuracy, student, data)
        told = {"epoch": progress.epoch, "validation": validation, "test": test, "alone": alone}
        tune.report(told | {"progress": asdict(progress)})  # last: ASHA may end the trial here

    run(trial.settings, after_step=on_step, after_epoch=on_epoch)


def _outcome(result: tune.Result) -> Outcome:
    metrics = result.metrics or {}
    error = str(result.error).strip().splitlines()[-1] if result.error else ""
    if "progress" not in metrics:
        return Outcome(error=error)
    return Outcome(
        progress=Progress(**metrics["progress"]),
        validation=metrics["validation"],
        test=metrics["test"],
        alone=metrics["alone"],
        error=error,
        ended=bool(metrics.get("done")),
    )
