"""Students: what accuracy costs in teacher samples, what is selected, and who waits."""

from frame import board
from grafana_foundation_sdk.models import dashboard as models
from panels import RUN, against, bars, figure, heat, lines, rows
from queries import JOB, mean, of, rate, share, total

RUNS = "tenant, job"
ABOUT = ("tenant", "job", "method", "dataset", "student", "strategy", "mixing", "fingerprint")
ACCURACY, EARLIER = (
    f"max by ({RUNS}) ({of('preceptor_student_accuracy_ratio')}{when})" for when in ("", " offset $__interval")
)
# After each epoch it is another, as a rule: a point for each, and none for the time between.
NEW_ACCURACY = f"({ACCURACY} unless {ACCURACY} == {EARLIER})"
# Of all its processes: a run that was killed and goes on counts anew.
ASKED = f"sum by ({RUNS}) (last_over_time({of('preceptor_student_asked_samples_total')}[$__range]))"
LOSS = mean("preceptor_student_loss", RUNS)
CANDIDATES = "preceptor_student_candidate_samples_total"
ASKED_NAME = "preceptor_student_asked_samples_total"
WAIT = "preceptor_student_teacher_wait_seconds"
STEP = "preceptor_student_step_seconds"
INFO = of("preceptor_student_info")


def of_range(metric: str) -> str:
    """Its last value in the range, also of a run that has ended."""
    return f"last_over_time({of(metric)}[$__range])"


def uncertainty(decision: str) -> str:
    return f'{JOB}, decision="{decision}"'


def built() -> models.Dashboard:
    source = 'tenant=~"$tenant", job=~"$job", source=~"cached|coalesced"'
    steps, planned = (
        f"max by ({RUNS}) ({of_range(f'preceptor_student_{name}_steps')})" for name in ("reached", "planned")
    )
    first = [
        figure("Runs under way", f"count(count by ({RUNS}) ({INFO}))", "short", "Now.", empty="none"),
        figure(
            "Best accuracy",
            f"max({of_range('preceptor_student_accuracy_ratio')})",
            "percentunit",
            "On the test set, after the last whole epoch; the best of the runs chosen.",
            decimals=2,
            empty="no epoch yet",
        ),
        figure(
            "Samples asked", total(ASKED_NAME), "short", "Of the teacher, over the range, whoever computed the answer."
        ),
        figure(
            "Selection rate",
            share(total(ASKED_NAME), total(CANDIDATES)),
            "percentunit",
            "Of the samples that students saw, those that they asked about. `keep`, for a run of unix.",
            empty="nothing seen",
        ),
        figure(
            "Waiting for the teacher",
            share(total(f"{WAIT}_sum"), total(f"{STEP}_sum")),
            "percentunit",
            "Of the time of all steps. Much of it: the teacher is slow, or queries are not in flight while the student "
            "learns (depth 0).",
            steps=((None, "green"), (0.3, "orange"), (0.6, "red")),
            empty="no steps",
        ),
        figure(
            "Not computed for them",
            share(total("preceptor_student_answers_total", labels=source), total("preceptor_student_answers_total")),
            "percentunit",
            "Of the answers, those that were cached or coalesced, and cost nothing.",
            empty="no answers",
        ),
    ]
    price = [
        against(
            "Accuracy against teacher samples",
            ("samples asked", f"{ASKED} and {NEW_ACCURACY}"),
            ("accuracy", f"{NEW_ACCURACY} and {ASKED}", "percentunit"),
            "A point after each epoch, by the samples that the run had asked about till then: of this range, over all "
            "its processes, as scraped, so up to one scrape more. Two epochs of the same accuracy are one point.",
            top=1,
        ),
        against(
            "Loss against teacher samples",
            ("samples asked", f"{ASKED} and {LOSS}"),
            ("loss", f"{LOSS} and {ASKED}", "short"),
            "Mean of the steps of a rate interval, by the samples that the run had asked about till then.",
        ),
    ]
    over_time = [
        lines("Accuracy", {RUN: ACCURACY}, "percentunit", "On the test set, after the last whole epoch.", top=1),
        lines("Loss", {RUN: LOSS}, "short", "Mean of the steps of a rate interval."),
    ]
    selection = [
        lines(
            "Selection rate, by job",
            {RUN: share(rate(ASKED_NAME, RUNS), rate(CANDIDATES, RUNS))},
            "percentunit",
            "Samples asked about, of those seen.",
            top=1,
        ),
        lines(
            "Uncertainty of kept and dropped samples",
            {
                f"{RUN}, {decision}": mean("preceptor_student_uncertainty_ratio", RUNS, uncertainty(decision))
                for decision in ("kept", "dropped")
            },
            "percentunit",
            "Mean; 0 is sure, 100 % as unsure as can be. Where the two are near each other, selection chooses little.",
            top=1,
        ),
        heat(
            "Uncertainty of kept samples",
            rate("preceptor_student_uncertainty_ratio_bucket", "le", uncertainty("kept")),
            "percentunit",
            "Samples a second; 0 is sure, 100 % as unsure as can be.",
        ),
        heat(
            "Uncertainty of dropped samples",
            rate("preceptor_student_uncertainty_ratio_bucket", "le", uncertainty("dropped")),
            "percentunit",
        ),
    ]
    time = [
        lines(
            "Share of a step spent waiting for the teacher",
            {RUN: share(rate(f"{WAIT}_sum", RUNS), rate(f"{STEP}_sum", RUNS))},
            "percentunit",
            width=8,
            top=1,
        ),
        lines("A step, its wait included", {RUN: mean(STEP, RUNS)}, "s", "Mean of a rate interval.", width=8),
        lines(
            "Answers by source",
            {"{{source}}": rate("preceptor_student_answers_total", "source")},
            "short",
            stacked=True,
            width=8,
            axis="samples / s",
        ),
    ]
    progress = bars(
        "Progress",
        {RUN: share(steps, planned)},
        "percentunit",
        "Steps done, of those planned; of runs of the range. One that ended early stays below 100 %.",
        top=1,
    )
    runs = rows(
        "Runs",
        {
            "is": (f"max by ({', '.join(ABOUT)}) ({of_range('preceptor_student_info')})", "short"),
            "accuracy": (f"max by ({RUNS}) ({of_range('preceptor_student_accuracy_ratio')})", "percentunit"),
            "steps": (steps, "locale"),
            "asked": (ASKED, "locale"),
        },
        "Of the range, those that have ended too.",
        labels=ABOUT,
        order_by="accuracy",
        hidden=("Value #A",),
        width=16,
        height=8,
    )
    return board(
        "preceptor-students",
        "What accuracy costs in teacher samples, what students select, and how long they wait.",
        "3h",
        "30s",
        {
            "": first,
            "What accuracy costs": [*price, *over_time],
            "What is selected": selection,
            "Where their time goes": time,
            "Runs": [runs, progress],
        },
    )
