"""What every report of several runs has: a table in plain text, where it was made, how much is noise, a plot."""

import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def text_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """`rows`, the first of which is the head, in columns; the first `left` columns start at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if number < left else text.rjust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def origin() -> dict[str, object]:
    """Machine, date and versions."""
    return {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("preceptor", "torch", "numpy", "grpcio")},
    }


def noise(accuracy: float, items: int) -> float:
    """The difference, 0..1, below which two runs of about this accuracy on so many test items may well be equals.

    95 %, by the normal approximation, for runs that err independently; runs that err on the same items differ by less.
    """
    return 1.96 * math.sqrt(2 * accuracy * (1 - accuracy) / items)


@contextmanager
def accuracy_plot(
    path: Path, title: str, teacher_top1: float, *, across: str, up: str, legend_below: bool = False
) -> Iterator[Axes]:
    """Axes to draw accuracies (%) on, against samples; written to `path` when left.

    `across` and `up` label them; `teacher_top1`, 0..1, is a line where it is known, so not 0. `legend_below`: the
    legend has a place of its own, where its lines are long or many.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    yield axes
    if teacher_top1:
        axes.axhline(100 * teacher_top1, color="0.5", linestyle="--", linewidth=1, label=f"teacher: {teacher_top1:.2%}")
    axes.margins(x=0.1, y=0.1)
    axes.set_ylim(top=min(100.5, axes.get_ylim()[1]))
    axes.set_title(title, fontsize="medium")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend_below:
        figure.legend(loc="outside lower left", frameon=False)
    else:
        axes.legend(loc="lower right", frameon=False)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    figure.savefig(path, dpi=150)
