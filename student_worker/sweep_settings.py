"""The knobs of a sweep, and which of train's it may try."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from protos.settings import Settings
from student_worker.config import (
    DataConfig,
    FailuresConfig,
    Method,
    MetricsConfig,
    TeacherConfig,
    TrainConfig,
    TrainSettings,
    UnixConfig,
)
from student_worker.space import points


class SweepSettings(
    DataConfig, TeacherConfig, UnixConfig, TrainConfig, MetricsConfig, FailuresConfig, Settings, env_prefix="STUDENT_"
):
    """Train many students at once on a Ray cluster, with one teacher; compare what each value of a knob buys.

    Ray is found as Ray finds it: RAY_ADDRESS, else a cluster on this machine, else one is started for the sweep. Every
    path must be valid on the nodes.
    """

    method: Method = "unix"
    """As of train; so are all knobs that the space does not name."""
    seed: int = 0
    """As of train."""
    space: tuple[dict[str, Any], ...] = ()
    """What to try, as JSON (in TOML: [space], or several of [[space]]): a table from a knob of train to a list (all
    lists are crossed), to {"choice": [...]}, {"uniform": [low, high]}, {"loguniform": [low, high]} or {"randint": [low,
    high]} (drawn, as --trials says), or to one value. Given more than once, each table is tried."""
    trials: int = Field(default=1, ge=1)
    """Trials at each point of the lists, where anything is drawn."""
    space_seed: int = 0
    """Of what is drawn from the space."""
    concurrent_trials: int = Field(default=0, ge=0)
    """Trials at a time, at most; 0 = as many as the cluster has CPUs and GPUs for."""
    cpus_per_trial: float = Field(default=1.0, ge=0)
    """CPUs that Ray sets aside for each."""
    gpus_per_trial: float = Field(default=0.0, ge=0)
    """GPUs, or a share of one, for each; with 0, --device auto is the CPU."""
    asha: bool = False
    """End the trials that lag behind early (ASHA), by their accuracy on half of the test items; the other half is not
    looked at for it, and is what the report shows."""
    asha_grace: int = Field(default=1, ge=1)
    """Epochs that every trial may take."""
    asha_reduction: float = Field(default=3.0, gt=1)
    """Of so many trials at an epoch where ASHA decides, one goes on."""
    output: Path = Path("runs/sweep")
    """Folder for report.json, plot.png, a folder for each trial, and Ray Tune's own; seen by all nodes."""
    overwrite: bool = False
    """Remove another sweep's files from the output folder first."""
    job: str = "sweep"
    """Prefix of the trials' names at the teacher, which books the spend of each."""

    @field_validator("space", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _can_be_swept(self) -> Self:
        """Of all fields together, so that what was given is not repeated: it may hold a secret."""
        if not any(self.space):
            raise ValueError("space: nothing to try; give for example --space '{\"seed\": [0, 1, 2]}'")
        if self.metrics_port:
            raise ValueError(
                f"metrics_port: {self.metrics_port} can be one trial's alone; give --metrics-targets, or 0"
            )
        for name in (name for table in self.space for name in table):
            if name not in _SWEPT:
                raise ValueError(f"space: {name} {_why_not_swept(name)} (--space)")
        if self.asha and any("epochs" in table for table in self.space):
            raise ValueError(
                "space: epochs with asha would compare students in different parts of their schedules; "
                "give --epochs, or --no-asha"
            )
        try:
            points(self.space, self.trials, self.space_seed)
        except ValueError as error:
            raise ValueError(f"space: {error} (--space)") from None
        return self


_ONE_BANK = frozenset({"dataset", "data_directory", "view_seed"})
_SWEPT = frozenset({"method", "seed"}) | frozenset(DataConfig.model_fields | UnixConfig.model_fields) - _ONE_BANK
_SWEPT |= frozenset(TrainConfig.model_fields)


def _why_not_swept(name: str) -> str:
    flag = f"--{name.replace('_', '-')}"
    if name in _ONE_BANK:
        return f"is one for all: the students share a bank of views, and its answers; give {flag}"
    if name in TeacherConfig.never_flags:
        return "is a secret; put it into a file for --token-file"
    if name in TeacherConfig.model_fields:
        return f"is one for all: the students share a teacher; give {flag}"
    if name in ("output", "job"):
        return f"is each trial's own, made of {flag} and its number"
    if name in TrainSettings.model_fields:
        return "is not of what is learnt, or how; it cannot be swept"
    near = get_close_matches(name, _SWEPT, n=1)
    return f"is no knob of train{f'; did you mean {near[0]}?' if near else ''}"
