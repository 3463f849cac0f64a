"""What a sweep found: each trial's accuracy against what it asked of the teacher, what sharing saved, the spend."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from protos import teacher_pb2 as pb
from student_worker.data import Dataset
from student_worker.report import accuracy_plot, noise, origin, text_table
from student_worker.sweep import Outcome, Trial, halves
from student_worker.sweep_settings import SweepSettings
from student_worker.sweep_spend import COUNTS

BUDGET_SPENT = 3  # as train's
_LABEL_LENGTH = 72  # of a trial, in the plot's legend: its width


class SweepReport:
    """The report of a sweep: its text, and report.json and plot.png in the output folder."""

    def __init__(
        self,
        settings: SweepSettings,
        *,
        trials: Sequence[Trial],
        outcomes: Sequence[Outcome],
        spent: Sequence[Counter[str]],
        teacher: pb.TeacherDescription,
        data: Dataset,
    ) -> None:
        """`spent`: of each trial, as Books.since gives it. `teacher` is empty where no trial has one."""
        self._settings, self._trials, self._outcomes = settings, trials, outcomes
        self._spent, self._teacher, self._data = spent, teacher, data
        self._fields = list(dict.fromkeys(name for trial in trials for name in trial.values))
        self.statuses = [
            outcome.status(settings, trial.settings.epochs) for trial, outcome in zip(trials, outcomes, strict=True)
        ]

    @property
    def exit_status(self) -> int:
        """0: all trials ended. 1: one failed, or was interrupted. 3: none did, but one's budget was spent."""
        if "failed" in self.statuses or "unfinished" in self.statuses:
            return 1
        return BUDGET_SPENT if "budget spent" in self.statuses else 0

    def write(self) -> str:
        """Writes the files; returns table and remarks."""
        output = self._settings.output
        output.mkdir(parents=True, exist_ok=True)
        report = {
            "settings": self._settings.model_dump(mode="json"),
            **origin(),
            "items": {"train": len(self._data.train_x), "test": len(self._data.test_x)},
            "teacher": {
                "name": self._teacher.name,
                "fingerprint": self._teacher.fingerprint,
                "flops_per_sample": self._teacher.flops_per_sample,
            },
            "trials": [self._record(number) for number in range(len(self._trials))],
            "total": self.total(),
            "remarks": self.remarks(),
        }
        (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        self._plot()
        return "\n".join([self.table(), *self.remarks()])

    def total(self) -> dict[str, int]:
        """What the ledger booked to the trials together, and how many answers sharing saved."""
        total = Counter[str]()
        for spent in self._spent:
            total.update(spent)
        return {**total, "saved_by_sharing": self._alone() - self._computed()}

    def table(self) -> str:
        head = ("trial", *self._fields, "status", "steps", "validation %", "test %", *COUNTS, "alone", "cost")
        return text_table([head, *map(self._row, range(len(self._trials)))], left=2 + len(self._fields))

    def remarks(self) -> list[str]:
        """What a reader must know about the table."""
        remarks = [
            *self._about_accuracy(),
            *self._about_sharing(),
            *self._about_spend(),
        ]
        for trial, outcome in zip(self._trials, self._outcomes, strict=True):
            if outcome.error:
                remarks.append(f"Trial {trial.number} failed: {outcome.error}")
        return remarks

    def _about_accuracy(self) -> list[str]:
        known = [(outcome.test, outcome.progress.steps) for outcome in self._outcomes if outcome.progress]
        if not known:
            return []
        chosen, reported = map(len, halves(len(self._data.test_x)))
        best = max(test or 0.0 for test, _ in known)
        steps = {number for _, number in known}
        remarks = [
            f"Accuracy after each trial's last epoch, on two halves of the {chosen + reported} test items: choose a "
            f"trial by validation ({chosen}), and believe its test ({reported}), by which nothing was chosen. "
            f"Differences below {100 * noise(best, reported):.1f} points may be noise.",
            f"All at equal steps, {min(steps):,}."
            if len(steps) == 1
            else f"NOT at equal steps: from {min(steps):,} to {max(steps):,}.",
        ]
        if self._settings.asha:
            remarks.append(
                f"ASHA ended {self.statuses.count('pruned')} trials early, by validation, epoch for epoch; a pruned "
                "trial's accuracy is that of the epoch it ended at, in the middle of its learning rate's schedule."
            )
        return remarks

    def _about_sharing(self) -> list[str]:
        asking = [trial for trial in self._trials if trial.asks]
        if not asking:
            return []
        why = (
            "a mixed sample is drawn afresh, partner and share, so nobody ever asks the same again; method kd, and "
            "unix with --mixing none, ask about views, which students share"
        )
        if all(trial.mixes for trial in asking):
            return [f"Sharing saved 0 answers: {why}."]
        if not self._sharing():
            return []
        alone, computed = self._alone(), self._computed()
        asked = sum(self._spent[trial.number]["asked"] for trial in self._sharing())
        said = (
            f"Sharing saved {alone - computed:,} answers: of {asked:,} asked about, each trial with a cache for itself "
            f"would have had {alone:,} computed, all together had {computed:,}"
        )
        if bank := self._bank():
            said += f", {computed / bank:.3f} of the {bank:,} in the bank of views"
        if saved := (alone - computed) * self._teacher.price.nanos_per_sample:
            said += f"; that is {_money(saved, self._teacher.price.currency)}"
        remarks = [f"{said}."]
        partly = len(self._sharing()) < sum(not trial.mixes for trial in asking)
        if computed > alone and not partly:
            remarks.append(
                "More were computed than that: the server keeps no cache, or it was too small for the views."
            )
        if any(trial.mixes for trial in asking):
            remarks.append(f"Of the trials that mix, sharing saved 0: {why}.")
        if partly:
            remarks.append(
                "Trials that failed, were resumed or did not end count with what was computed for them, and not with "
                "what each would have had computed alone: sharing saved that much at least."
            )
        return remarks

    def _about_spend(self) -> list[str]:
        total = self.total()
        if not any(trial.asks for trial in self._trials):
            return []
        said = (
            f"Spend, as the ledger booked it to jobs {self._settings.job}-0000 and on: {total.get('computed', 0):,} "
            f"answers computed, {total.get('flops', 0):.3g} FLOPs, "
            f"{total.get('device_nanoseconds', 0) / 1e9:.1f} s of the teacher's device"
        )
        if money := _moneys(total):
            said += f", {money}"
        remarks = [f"{said}."]
        for trial, outcome, spent in zip(self._trials, self._outcomes, self._spent, strict=True):
            if spent["asked"] < outcome.answered:
                remarks.append(
                    f"The ledger has {spent['asked']:,} samples asked by job {trial.settings.job}, which had "
                    f"{outcome.answered:,} answered: another replica's books are late."
                )
        return remarks

    def _sharing(self) -> list[Trial]:
        """The trials whose questions may come again, of which it is known what they asked."""
        return [
            trial
            for trial, outcome, status in zip(self._trials, self._outcomes, self.statuses, strict=True)
            if trial.asks and not trial.mixes and outcome.alone is not None and status not in ("failed", "unfinished")
        ]

    def _alone(self) -> int:
        return sum(self._outcomes[trial.number].alone or 0 for trial in self._sharing())

    def _computed(self) -> int:
        """For all who may share, also those of which `alone` is not known: the others have these answers from them."""
        return sum(self._spent[trial.number]["computed"] for trial in self._trials if trial.asks and not trial.mixes)

    def _bank(self) -> int:
        """How many views there are that the sharing trials may show; 0 where those are not one bank."""
        banks = {(s.crop, s.flip, s.erase, s.views or s.epochs) for s in (trial.settings for trial in self._sharing())}
        if len(banks) != 1:
            return 0
        ((crop, flip, erase, views),) = banks
        return len(self._data.train_x) * (views if crop or flip or erase else 1)

    def _record(self, number: int) -> dict[str, Any]:
        trial, outcome, spent = self._trials[number], self._outcomes[number], self._spent[number]
        progress = outcome.progress
        return {
            "trial": number,
            "job": trial.settings.job,
            "values": trial.values,
            "status": self.statuses[number],
            "epochs": progress.epoch if progress else 0,
            "steps": progress.steps if progress else 0,
            "of_steps": progress.of_steps if progress else None,
            "validation": outcome.validation,
            "test": outcome.test,
            **spent,
            "alone": outcome.alone,
            "seconds": progress.seconds if progress else None,
            "budget_spent": progress.budget_spent if progress else "",
            "error": outcome.error,
        }

    def _row(self, number: int) -> tuple[str, ...]:
        trial, outcome, spent = self._trials[number], self._outcomes[number], self._spent[number]
        progress = outcome.progress
        return (
            str(number),
            *(_text(trial.values.get(field, "")) for field in self._fields),
            self.statuses[number],
            f"{progress.steps:,}" if progress else "",
            *("" if part is None else f"{100 * part:.2f}" for part in (outcome.validation, outcome.test)),
            *(f"{spent[name]:,}" for name in COUNTS),
            "" if outcome.alone is None else f"{outcome.alone:,}",
            _moneys(spent),
        )

    def _plot(self) -> None:
        title = f"{self._settings.dataset}, {len(self._trials)} trials; hollow: asked, filled: computed for it"
        across, up = "samples of the teacher (thousands)", "accuracy on the test half (%)"
        with accuracy_plot(
            self._settings.output / "plot.png", title, self._teacher_top1(), across=across, up=up, legend_below=True
        ) as axes:
            numbers: dict[tuple[float, float], list[str]] = {}  # of the trials at one point
            for trial, outcome, spent in zip(self._trials, self._outcomes, self._spent, strict=True):
                if outcome.test is None:
                    continue
                y = 100 * outcome.test
                asked, computed = spent["asked"] / 1000, spent["computed"] / 1000
                (line,) = axes.plot([computed, asked], [y, y], linewidth=1, label=self._label(trial))
                axes.plot([asked], [y], marker="o", fillstyle="none", color=line.get_color())
                axes.plot([computed], [y], marker="o", color=line.get_color())
                numbers.setdefault((asked, y), []).append(str(trial.number))
            for point, trials in numbers.items():
                axes.annotate(", ".join(trials), point, xytext=(5, 3), textcoords="offset points", fontsize="small")

    def _label(self, trial: Trial) -> str | None:
        if len(self._trials) > 10:  # the number beside each point must do
            return None
        label = f"{trial.number}: " + ", ".join(f"{name} {_text(value)}" for name, value in trial.values.items())
        return label if len(label) <= _LABEL_LENGTH else f"{label[: _LABEL_LENGTH - 1]}…"

    def _teacher_top1(self) -> float:
        return self._teacher.outputs[0].top1 if self._teacher.outputs else 0.0


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _money(nanos: float, currency: str) -> str:
    return f"{nanos / 1e9:.6g} {currency}"


def _moneys(counts: dict[str, Any]) -> str:
    """What of it is money, a sum a currency; empty where nothing has a price."""
    return ", ".join(
        _money(n, name.removeprefix("nanos ")) for name, n in counts.items() if name.startswith("nanos ") and n
    )
