"""Several methods, the same steps, the same seeds: what does each answer of the teacher buy?"""

import json
import secrets
import statistics
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from scipy import stats

from protos import teacher_pb2 as pb
from student_worker.config import CompareSettings, Method, TrainSettings
from student_worker.cost import computation
from student_worker.data import load
from student_worker.models import build, flops_per_sample
from student_worker.report import accuracy_plot, noise, origin, text_table
from student_worker.tls import Tls
from student_worker.train import Progress


@dataclass(frozen=True)
class Run:
    method: Method
    seed: int
    accuracy: float
    steps: int
    asked: int
    """Samples that the teacher was asked about, as its server counted them; `computed` and `cached` likewise."""
    computed: int
    cached: int
    scored: int
    learnt: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """A method over all seeds. Intervals are 95 %, Student's t; None with a single seed."""

    method: Method
    seeds: int
    accuracy: float
    accuracy_interval: float | None
    above_kd: float | None
    """Mean difference of accuracy to KD's with the same seed."""
    above_kd_interval: float | None
    asked: float
    computed: float
    cached: float
    share_of_kd_beta1: float
    """All computation, of teacher and student, over full KD's without a cache; beta = forwards a backward counts as."""
    share_of_kd_beta2: float
    seconds: float


def compare(settings: CompareSettings, run: Callable[[TrainSettings], Progress], teacher: pb.TeacherDescription) -> str:
    """Trains with each method and seed through `run`; writes report.json and plot.png; returns the table as text."""
    runs = []
    for seed in settings.seeds:
        for method in settings.methods:
            name = f"{method}-s{seed}"
            trial = _trial(settings, method, seed, name)
            before = _counted(settings, trial.job)
            progress = run(trial)
            if progress.budget_spent:
                raise ValueError(
                    f"the teacher's budget was spent in run {trial.job} after {progress.taught} of {progress.of_steps} "
                    f"steps, so there is nothing to compare at equal steps: {progress.budget_spent}"
                )
            counted = {name: n - before[name] for name, n in _counted(settings, trial.job).items()}
            if counted["asked"] < progress.asked:
                raise ValueError(
                    f"the server counts {counted['asked']} samples asked by job {trial.job}, which asked "
                    f"{progress.asked}: is {settings.metrics_url} this teacher's, and does it still keep jobs apart?"
                )
            runs.append(
                Run(
                    method=method,
                    seed=seed,
                    accuracy=progress.accuracy,
                    steps=progress.steps,
                    **counted,
                    scored=progress.scored,
                    learnt=progress.learnt,
                    seconds=progress.seconds,
                )
            )
    data = load(settings.dataset, settings.data_directory)
    channels, size, _ = data.shape
    student = build(settings.student, channels=channels, classes=data.classes, size=size, **settings.student_arguments)
    student_flops = flops_per_sample(student, data.shape)
    whole = settings.epochs * len(data.train_x)
    summaries = [_summary(each, runs, teacher.flops_per_sample, student_flops, whole) for each in settings.methods]
    report = {
        "settings": settings.model_dump(mode="json"),
        **origin(),
        "items": {"train": len(data.train_x), "test": len(data.test_x)},
        "teacher": {
            "name": teacher.name,
            "fingerprint": teacher.fingerprint,
            "flops_per_sample": teacher.flops_per_sample,
            "top1": teacher.outputs[0].top1,
        },
        "student": {"name": settings.student, "flops_per_sample": student_flops},
        "summary": [asdict(summary) for summary in summaries],
        "runs": [asdict(each) for each in runs],
    }
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    title = f"{settings.dataset}, {settings.labelled or len(data.train_x)} labelled of {len(data.train_x)}"
    title += f", {len(settings.seeds)} seeds; bars: 95 % over seeds" if len(settings.seeds) > 1 else ", one seed"
    _plot(summaries, teacher.outputs[0].top1, title, settings.output / "plot.png")
    return f"{table(summaries)}\n{_remarks(summaries, settings, len(data.test_x))}"


def _remarks(summaries: Sequence[Summary], settings: CompareSettings, items: int) -> str:
    """What a reader must know about the table: the variant of UNIX, and how much of it is noise."""
    remarks = [
        "Accuracy after the last epoch, all at equal steps; asked, computed and cached as the server counted them."
    ]
    if "unix" in settings.methods:
        remarks.append(
            f"unix: {settings.strategy} scores in {settings.score_mode} mode, {settings.mixing} mixing, keeps "
            f"{settings.keep:.0%}, depth {settings.depth}" + (" (the published step)." if settings.depth == 0 else ".")
        )
    if any(s.accuracy_interval is not None for s in summaries):
        remarks.append(
            f"95 % intervals over {len(settings.seeds)} seeds (Student's t), paired by seed against KD; the {items} "
            "test items and the choice of labelled ones are the same for all."
        )
    else:
        best = max(s.accuracy for s in summaries)
        remarks.append(
            f"One seed, {items} test items: differences below {100 * noise(best, items):.1f} points may be noise."
        )
    return "\n".join(remarks)


def table(summaries: Sequence[Summary]) -> str:
    head = (
        "method",
        "accuracy %",
        "vs KD",
        "asked",
        "computed",
        "cached",
        "of KD's computation, beta 1 | 2",
        "seconds",
    )
    return text_table([head, *map(_row, summaries)])


def _row(s: Summary) -> tuple[str, ...]:
    return (
        s.method,
        _points(s.accuracy, s.accuracy_interval),
        "" if s.above_kd is None or s.method == "kd" else _points(s.above_kd, s.above_kd_interval, sign="+"),
        f"{s.asked:,.0f}",
        f"{s.computed:,.0f}",
        f"{s.cached:,.0f}",
        f"{s.share_of_kd_beta1:.1%} | {s.share_of_kd_beta2:.1%}",
        f"{s.seconds:.0f}",
    )


def _points(value: float, interval: float | None, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}" + ("" if interval is None else f" ± {100 * interval:.2f}")


def _trial(settings: CompareSettings, method: Method, seed: int, name: str) -> TrainSettings:
    fields: dict[str, Any] = {
        key: getattr(settings, key) for key in TrainSettings.model_fields if key in CompareSettings.model_fields
    }
    return TrainSettings(
        **fields
        | {
            "config": None,
            "method": method,
            "seed": seed,
            "job": f"{settings.job}-{name}",
            # Its own at every invocation: what another run left in the cache would blur the comparison.
            "cache_namespace": f"{settings.job}-{name}/{secrets.token_hex(8)}",
            "output": settings.output / name,
        }
    )


def _counted(settings: CompareSettings, job: str) -> dict[str, int]:
    """The asked, computed and cached samples of a job so far, over all tenants, from the server's own /metrics."""
    url, file = settings.metrics_url, settings.metrics_token_file
    token = file.read_text().strip() if file else settings.bearer_token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    trust = Tls(settings.tls_ca_file, settings.tls_certificate_file, settings.tls_key_file)
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the operator's own address
        with urllib.request.urlopen(request, timeout=10, context=trust.context()) as reply:  # noqa: S310
            families = text_string_to_metric_families(reply.read().decode())
    except OSError as error:
        fix = "give the teacher's /metrics"
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            fix = "give a viewer's token as --metrics-token-file"
        raise ValueError(f"metrics_url: {url} cannot be read ({error}); {fix}") from error
    counted = dict.fromkeys(("asked", "computed", "cached"), 0)
    for sample in (sample for family in families for sample in family.samples):
        if sample.labels.get("job") == job:
            if sample.name == "preceptor_asked_samples_total":
                counted["asked"] += int(sample.value)
            elif sample.name == "preceptor_samples_total" and sample.labels["source"] in counted:
                counted[sample.labels["source"]] += int(sample.value)
    return counted


def _summary(method: Method, runs: Sequence[Run], teacher_flops: float, student_flops: float, whole: int) -> Summary:
    """`whole`: the samples that full KD asks about and learns from in these epochs."""
    ours = [each for each in runs if each.method == method]
    kd = {each.seed: each.accuracy for each in runs if each.method == "kd"}
    differences = [each.accuracy - kd[each.seed] for each in ours if each.seed in kd]

    def share(backward: float) -> float:
        full = computation(
            asked=whole, scored=0, learnt=whole,
            teacher_flops=teacher_flops, student_flops=student_flops, backward=backward,
        )  # fmt: skip
        return statistics.mean(
            computation(
                asked=each.computed, scored=each.scored, learnt=each.learnt,
                teacher_flops=teacher_flops, student_flops=student_flops, backward=backward,
            ) / full
            for each in ours
        )  # fmt: skip

    return Summary(
        method=method,
        seeds=len(ours),
        accuracy=statistics.mean(each.accuracy for each in ours),
        accuracy_interval=_interval([each.accuracy for each in ours]),
        above_kd=statistics.mean(differences) if differences else None,
        above_kd_interval=_interval(differences),
        asked=statistics.mean(each.asked for each in ours),
        computed=statistics.mean(each.computed for each in ours),
        cached=statistics.mean(each.cached for each in ours),
        share_of_kd_beta1=share(1.0),
        share_of_kd_beta2=share(2.0),
        seconds=statistics.mean(each.seconds for each in ours),
    )


def _interval(values: Sequence[float]) -> float | None:
    """Half the width of the mean's 95 % confidence interval, by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


def _plot(summaries: Sequence[Summary], teacher_top1: float, title: str, path: Path) -> None:
    across, up = "samples that the teacher computed (thousands)", "student's test accuracy, last epoch (%)"
    with accuracy_plot(path, title, teacher_top1, across=across, up=up) as axes:
        for s, marker in zip(summaries, "osD^v", strict=False):
            error = None if s.accuracy_interval is None else 100 * s.accuracy_interval
            label = f"{s.method}: {_points(s.accuracy, s.accuracy_interval)} %"
            x, y = s.computed / 1000, 100 * s.accuracy
            axes.errorbar(x, y, yerr=error, fmt=marker, markersize=9, fillstyle="none", markeredgewidth=2, label=label)
