"""The student's knobs, one model per component. Only `__main__` reads the environment and the command line."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, SecretStr, field_validator, model_validator
from pydantic_settings import CliPositionalArg, CliSuppress

from protos.settings import Settings

Method = Literal["hard", "hard+mixup", "kd", "kd+mixup", "unix"]
CHECKED_SAMPLES = 256
"""Labelled samples that a teacher is asked about to see whether it understands the data."""
METHODS: tuple[Method, ...] = ("hard", "hard+mixup", "kd", "kd+mixup", "unix")


class DataConfig(BaseModel, use_attribute_docstrings=True):
    """What is learnt from."""

    dataset: Literal["digits", "mnist5k", "fashion-mnist"] = "mnist5k"
    """Data set; see student_worker/data.py for where each comes from."""
    data_directory: Path | None = None
    """Folder with the data set's own files, for those that have files."""
    labelled: int = Field(default=0, ge=0)
    """How many training items have a label, evenly over the classes; 0 = all. The others only a teacher can use."""
    crop: int = Field(default=0, ge=0)
    """Views: pixels of zero padding of which a window is cut at random."""
    flip: bool = False
    """Views: mirror left and right with probability 1/2."""
    erase: int = Field(default=0, ge=0)
    """Views: a rectangle of up to so many pixels a side is filled with 0."""
    views: int = Field(default=0, ge=0)
    """Views of each item, shown in turn; 0 = a fresh one each epoch. Students with the same views ask the same."""
    view_seed: int = 0
    """Seed of the views and of the choice of labelled items; apart from --seed, so that students can share views."""


class TeacherConfig(BaseModel, use_attribute_docstrings=True):
    """Whom to ask."""

    teacher_address: str = "127.0.0.1:8001"
    """host:port of the teacher's gRPC port; several, joined by commas, share the work and take over from one another.
    Of replicas that know one another one is enough, or a name that leads to all of them (dns:///NAME:PORT)."""
    teacher_name: str = ""
    """Which of the teachers served there; empty = the only one."""
    token_file: Path | None = None
    """File that holds this student's token; never the token itself, which a process list would show."""
    token: CliSuppress[SecretStr | None] = Field(default=None, exclude=True)
    """The token itself, as STUDENT_TOKEN; where no file is given."""
    tls: bool = False
    """Speak TLS, and trust the CAs that this machine knows. Implied by the files below."""
    tls_ca_file: Path | None = None
    """CAs (PEM) that the server's certificate must be signed by, instead."""
    tls_certificate_file: Path | None = None
    """This student's own certificate (PEM), for a server that asks for one; it is shown beside the token."""
    tls_key_file: Path | None = None
    """That certificate's key (PEM)."""
    teacher_timeout: float = Field(default=60.0, gt=0)
    """Seconds that each call of a query may take, retries included."""
    cache_namespace: str = ""
    """Answers are cached under this name and found under it only; empty = the cache that the server shares."""

    never_flags: ClassVar[frozenset[str]] = frozenset({"token"})

    def bearer_token(self) -> str | None:
        if self.token_file:
            return self.token_file.read_text().strip()
        return self.token.get_secret_value().strip() if self.token else None


class UnixConfig(BaseModel, use_attribute_docstrings=True):
    """The published algorithm's numbers (UNIX, arXiv 2012.09413); the defaults are the authors' script."""

    keep: float = Field(default=0.75, gt=0, le=1)
    """Share of a batch that is kept, asked about and learnt from."""
    clean: float = Field(default=0.5, ge=0, le=1)
    """Rank, as a share of the batch, at which the mixing coefficient crosses 1/2."""
    sharpness: float = Field(default=10.0, ge=0)
    """How steeply it crosses."""
    strategy: Literal["random", "confidence", "margin", "entropy"] = "entropy"
    """What counts as uncertain."""
    mixing: Literal["adaptive", "uniform", "none"] = "adaptive"
    """How kept samples are mixed."""
    score_mode: Literal["train", "eval"] = "train"
    """Mode of the student while it scores; in train, the authors' choice, batch-norm statistics move twice a step."""
    depth: int = Field(default=1, ge=0)
    """Queries in flight while the student learns; above 0 the selection is that many steps old."""


class TrainConfig(BaseModel, use_attribute_docstrings=True):
    """How the student is trained."""

    student: str = "cnn-tiny"
    """A name of student_worker/models.py, or your own package.module:factory."""
    student_arguments: dict[str, Any] = {}
    """Keyword arguments for the student's factory, as JSON."""
    epochs: int = Field(default=10, ge=1)
    """Passes over the training set."""
    batch_size: int = Field(default=64, ge=2)
    """Samples of a batch, before selection."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Peak of the one-cycle schedule; SGD with Nesterov momentum 0.9."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Of SGD, on all parameters."""
    temperature: float = Field(default=4.0, gt=0)
    """Of the distillation loss."""
    label_weight: float = Field(default=0.0, ge=0)
    """Weight of the hard labels' cross-entropy beside the distillation loss."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of the student's passes; 0 leaves the choice to torch."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where it is there."""
    on_budget_spent: Literal["stop", "hard-labels"] = "stop"
    """stop: the run ends, its checkpoint is written, exit status 3. hard-labels: the other steps learn from labels."""


class MetricsConfig(BaseModel, use_attribute_docstrings=True):
    """Where Prometheus finds a run (docs/metrics.md, "A student's own metrics")."""

    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Serves /metrics on this port, of the address from which the teacher is reached; 0 takes a free one."""
    metrics_targets: Path | None = None
    """Folder in which the run tells Prometheus of itself (file_sd), by a file that it removes at its end. Made where it
    is missing; without --metrics-port a free port is taken."""

    @property
    def exports_metrics(self) -> bool:
        return self.metrics_port is not None or self.metrics_targets is not None


class FailuresConfig(BaseModel, use_attribute_docstrings=True):
    """What becomes of a run on a cluster where a part of it is lost."""

    max_failures: int = Field(default=3, ge=-1)
    """How often lost workers, or a failed trial of a sweep, are begun again, and go on from their last state; -1: each
    time."""


class WorkersConfig(FailuresConfig):
    """Where the student is trained: in this process, or by several workers on a Ray cluster."""

    num_workers: int = Field(default=0, ge=0)
    """Workers under Ray Train that train the one student, each on its part of every batch; 0 trains in this process."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs that Ray sets aside for each worker; also a GPU where device is cuda, or auto and the cluster has enough."""
    sync_batch_norm: bool = False
    """Batch norm over all workers' parts, as one worker would see them, instead of over each one's own; GPUs only."""


class TrainSettings(
    DataConfig, TeacherConfig, UnixConfig, TrainConfig, MetricsConfig, WorkersConfig, Settings, env_prefix="STUDENT_"
):
    """Train a student, from labels or from a teacher.

    Every option is also an environment variable (STUDENT_EPOCHS) and a key of the TOML file given by --config; the
    command line wins over the environment, the environment over the file.
    """

    method: Method = "unix"
    """hard: labels alone. kd: all samples are asked about, unmixed. +mixup: one share for all. unix: the paper's."""
    seed: int = 0
    """Of the student's weights, data order and mixing."""
    job: str = "train"
    """Name of this run at the teacher: its spend is booked under it."""
    output: Path = Path("runs/train")
    """Folder for checkpoints, metrics and TensorBoard's event files."""
    overwrite: bool = False
    """Remove another run's files from the output folder first; not those of the run that --resume goes on with."""
    resume: bool = False
    """Go on with the run whose state is in the output folder, as if it had never stopped; where none is, begin."""
    checkpoint_steps: int = Field(default=0, ge=0)
    """Steps between two writings of the state that --resume reads; 0 = it is written at each epoch's end only."""

    free_on_resume: ClassVar[frozenset[str]] = (
        frozenset(TeacherConfig.model_fields | MetricsConfig.model_fields) - {"cache_namespace"}
    ) | {
        "config", "output", "overwrite", "resume", "checkpoint_steps", "max_failures", "cpus_per_worker",
    }  # fmt: skip
    """Fields in which a resumed run may differ from what it began with: none changes what is learnt."""

    @model_validator(mode="after")
    def _one_port_each(self) -> Self:
        if self.metrics_port and self.num_workers > 1:
            raise ValueError(
                f"metrics_port: {self.metrics_port} can be one worker's alone; give --metrics-targets, or 0"
            )
        return self

    def deciding(self) -> dict[str, Any]:
        """The other fields, in JSON's terms: they decide what is learnt, or name the run at the teacher."""
        return self.model_dump(mode="json", exclude=set(self.free_on_resume))


class CheckSettings(DataConfig, TeacherConfig, Settings, env_prefix="STUDENT_"):
    """Ask a teacher about labelled clean samples, and say whether it understands the data."""

    samples: int = Field(default=CHECKED_SAMPLES, ge=1)
    """How many labelled samples to ask about, at most."""
    job: str = "check"
    """Name of this run at the teacher: its spend is booked under it."""


class CompareSettings(DataConfig, TeacherConfig, UnixConfig, TrainConfig, Settings, env_prefix="STUDENT_"):
    """Train with several methods at equal steps, and compare accuracy and teacher compute."""

    methods: tuple[Method, ...] = METHODS
    """Those to compare, joined by commas (in the environment and in TOML: a list)."""
    seeds: tuple[int, ...] = (0,)
    """Each method is trained once with each, and methods are paired by seed. Joined by commas, as methods are."""
    metrics_url: str = "http://127.0.0.1:8000/metrics"
    """The teacher's own counters, from which asked and computed samples are read. A server with tokens shows them to
    viewers and admins."""
    metrics_token_file: Path | None = None
    """File that holds a viewer's token for --metrics-url; without it the student's own is sent."""
    output: Path = Path("runs/compare")
    """Folder for report.json, plot.png and a folder for each run."""
    overwrite: bool = False
    """Remove other runs' checkpoints and event files from the output folder first."""
    job: str = "compare"
    """Prefix of the runs' names at the teacher."""
    on_budget_spent: CliSuppress[Literal["stop", "hard-labels"]] = "stop"
    """Not to choose here, as cache_namespace: the help does not offer what is refused."""
    cache_namespace: CliSuppress[str] = ""

    @field_validator("on_budget_spent")
    @classmethod
    def _stops(cls, value: str) -> str:
        if value != "stop":
            raise ValueError(
                "a run that goes on with labels is none of its method any more, so compare takes stop only"
            )
        return value

    @field_validator("cache_namespace")
    @classmethod
    def _of_its_own(cls, value: str) -> str:
        if value:
            raise ValueError(
                "each run of a comparison has a namespace of its own, so that none finds another's answers"
            )
        return value

    @field_validator("methods", "seeds")
    @classmethod
    def _distinct(cls, values: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(values)) < len(values) or not values:
            raise ValueError("give each once, and at least one: a repeated run is no further evidence")
        return values


class ClusterConfig(BaseModel, use_attribute_docstrings=True):
    """Which Ray cluster."""

    address: str = ""
    """http://host:port of the cluster's dashboard, which takes jobs. Empty: RAY_API_SERVER_ADDRESS, or else the cluster
    that runs on this machine."""


class LaunchSettings(ClusterConfig, TrainSettings, env_prefix="STUDENT_"):
    """Train on a Ray cluster: `train` as a job there, whose log is followed here.

    Takes what train takes, and gives the job what was set here; all paths are paths on the cluster's nodes. Ends with
    the job's exit status (143 if it was stopped). Ctrl-C leaves the job running: `student-worker launch status ID` says
    how it stands, `student-worker launch stop ID` ends it.
    """

    wait: bool = True
    """Follow the job until it ends; otherwise print its id, and nothing else on standard output."""
    submission_id: str = ""
    """The job's id at the cluster, never used there before; empty = one that Ray makes up."""
    working_dir: str = ""
    """Folder here, or URI of a zip file, that the job runs in: for a student of your own. Uploaded, but for what its
    .gitignore names; keep secrets out of it."""
    entrypoint_num_cpus: float = Field(default=0, ge=0)
    """CPUs that the cluster sets aside for the job's own process, beside those of --num-workers."""
    entrypoint_num_gpus: float = Field(default=0, ge=0)
    """GPUs likewise; without workers of its own, a job that is to train on a GPU needs one here."""

    @model_validator(mode="after")
    def _no_secret_travels(self) -> "LaunchSettings":
        if self.token and not self.token_file:
            raise ValueError(
                "token: STUDENT_TOKEN would stand in the job's description, for all who reach the cluster's dashboard; "
                "give --token-file, the path of a file on its nodes, or unset it where they have a token of their own"
            )
        for secret in (self.token_file, self.tls_key_file):
            if secret and self.working_dir and secret.is_relative_to(Path(self.working_dir).absolute()):
                raise ValueError(f"working_dir: {self.working_dir} holds {secret}, which would be uploaded with it")
        return self

    @model_validator(mode="after")
    def _paths_of_the_cluster(self) -> "LaunchSettings":
        if "output" not in self.model_fields_set:
            raise ValueError("output: give a folder on the cluster, by its absolute path (--output)")
        for name in sorted(TrainSettings.model_fields.keys() & self.model_fields_set - {"config"}):
            value = getattr(self, name)
            if isinstance(value, Path) and not value.is_absolute():
                raise ValueError(
                    f"{name}: {value} would be looked for wherever the cluster runs the job; give an absolute path, "
                    f"of the cluster's nodes (--{name.replace('_', '-')})"
                )
        return self


class StopSettings(ClusterConfig, Settings, env_prefix="STUDENT_"):
    """End a job that was launched, and wait until it has ended."""

    submission_id: CliPositionalArg[str]
    """The job's id, as launch said it."""


class StatusSettings(ClusterConfig, Settings, env_prefix="STUDENT_"):
    """Say how a job stands that was launched."""

    submission_id: CliPositionalArg[str]
    """The job's id, as launch said it."""
