"""The server's knobs, one model per component. Only `__main__` reads the environment and the command line."""

import os
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, SecretStr, model_validator

from protos.settings import Settings


class ModelConfig(BaseModel, use_attribute_docstrings=True):
    """Which network answers."""

    model: str = Field(pattern=r"^[\w.]+:[\w.]+$")
    """package.module:factory; called without arguments (or with --model-arguments), it gives a torch.nn.Module."""
    weights: Path
    """Its state dict: FILE.safetensors, or a .pt file, which is read with weights_only=True. Never unpickled."""
    model_arguments: dict[str, Any] = {}
    """Keyword arguments for the factory, as JSON."""
    description: Path | None = None
    """JSON with the teacher's inputs and outputs (protobuf JSON of TeacherDescription). Without it, what stands in
    the weights file's own metadata."""
    name: str = Field(default="teacher", pattern=r"^[\w.-]{1,64}$")
    """The name under which students find this teacher."""
    price_nanos: int = Field(default=0, ge=0, le=10**12)
    """What one computed sample costs, in 1e-9 of the currency."""
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")
    """ISO 4217 code of the price."""


class EngineConfig(BaseModel, use_attribute_docstrings=True):
    """How the network is run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where it is there."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32 without TF32, or bf16 autocast. Part of the fingerprint: it changes the answers."""
    channels_last: bool = True
    """Memory format of image tensors: faster convolutions, the same numbers up to rounding."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of a forward pass; 0 leaves the choice to torch."""


class BatcherConfig(BaseModel, use_attribute_docstrings=True):
    """How queries become batches."""

    max_batch_size: int = Field(default=64, ge=1)
    """Samples in one forward pass."""
    max_queue_delay_microseconds: int = Field(default=0, ge=0)
    """How long an idle device waits for a batch to fill. At 0 it never waits: batches form while it is busy."""
    max_queue_size: int = Field(default=4096, ge=1)
    """Samples that one job may have waiting."""
    max_queue_bytes: int = Field(default=256 * 2**20, ge=1)
    """Bytes that one job may have waiting."""
    max_tenant_queue_size: int = Field(default=16384, ge=1)
    """Samples that all jobs of one tenant may have waiting."""
    max_tenant_queue_bytes: int = Field(default=2**30, ge=1)
    """Bytes that all jobs of one tenant may have waiting."""


def _state_directory() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "preceptor"


class StoreConfig(BaseModel, use_attribute_docstrings=True):
    """Where answers and spend are kept."""

    cache_redis_url: SecretStr | None = None
    """Redis that keeps answers: redis://, rediss:// (TLS) or unix://, with a password if it has one (best given in
    the environment). Give it a maxmemory and allkeys-lru. Without it, an embedded Valkey."""
    ledger_redis_url: SecretStr | None = None
    """Redis that keeps the ledger: noeviction, with an append-only file. All replicas share it. Without it, an
    embedded Valkey with its files in --state-directory."""
    state_directory: Path = Field(default_factory=_state_directory)
    """This replica's own folder: its journal, and the embedded Valkey's files. One server at a time."""


class CacheConfig(BaseModel, use_attribute_docstrings=True):
    """Which answers are kept, and how long."""

    cache_max_bytes: int = Field(default=2**30, ge=2**22)
    """Memory of the embedded cache, of which Valkey itself takes 1 MiB. Beyond it the answers asked for least recently
    go (a given Redis has its own maxmemory)."""
    cache_ttl_seconds: int = Field(default=7 * 86400, ge=1)
    """How long an answer is kept, counted from when it was computed."""
    cache_job_share: float = Field(default=0.25, gt=0, le=1)
    """Part of the cache's memory that one job may fill with answers before it is seen to use cached ones; so a job
    whose samples never come again cannot push out those of others."""
    cache_scope: Literal["shared", "tenant"] = "shared"
    """Whether a tenant gets answers that another tenant's query computed. Shared saves most; it also lets a tenant
    find out, by the time of an answer, whether somebody has asked about a sample that it holds."""


class LedgerConfig(BaseModel, use_attribute_docstrings=True):
    """How spend is kept."""

    lease_seconds: float = Field(default=10.0, ge=0.5)
    """How long a replica that is heard of no more keeps what it had reserved of budgets."""
    request_record_seconds: int = Field(default=3600, ge=1)
    """How long a request id is remembered after its query: as long, the same query is not charged again. Each takes
    about 300 bytes of the ledger's Redis."""


class NetworkConfig(BaseModel, use_attribute_docstrings=True):
    """Where the server listens and what it lets in."""

    host: str = "127.0.0.1"
    """Address to bind. Anything but loopback needs --tokens-file."""
    grpc_port: int = Field(default=8001, ge=0, le=65535)
    """0 takes a free port and prints it."""
    http_port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free port and prints it."""
    max_message_bytes: int = Field(default=64 * 2**20, ge=2**16, lt=2**31)
    """Largest request or reply."""
    max_samples_per_query: int = Field(default=4096, ge=1)
    """Largest query; clients split what is larger."""
    max_concurrent_calls: int = Field(default=1024, ge=1)
    """gRPC calls under way at once; more are refused with RESOURCE_EXHAUSTED. One tenant may have half of them."""
    max_connections: int = Field(default=512, ge=4)
    """Connections that each of the two ports takes. On the HTTP port one peer address may have a quarter of them."""
    max_connection_age_seconds: float = Field(default=600.0, ge=1, le=10**6)
    """A gRPC client that has been connected for as long (a tenth more or less) is asked to connect anew, and to show
    its certificate again; behind a balancer it then may reach a newer replica. Its calls under way are finished."""
    shutdown_delay_seconds: float = Field(default=0.0, ge=0)
    """After SIGTERM: how long queries are still taken while /readyz and gRPC's health say no and students are told of
    this replica no more, so that balancers look away first. Then it drains."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """After SIGTERM and that delay: how long queued queries may take to finish; what is left then is refused and the
    process exits."""
    tokens_file: Path | None = None
    """Lines of `SHA256-OF-TOKEN TENANT [student|viewer|admin] [NAME]`, as `teacher-server token new` writes them; read
    again when it changes. Without the file everyone is tenant `default` and may do everything, on loopback only."""
    advertise_address: str | None = Field(default=None, pattern=r"^([\w.-]+|\[[0-9a-fA-F:.]+\])(:[1-9]\d{0,4})?$")
    """HOST, or HOST:PORT, at which students reach this replica; without a port, that of --grpc-port. Replicas that
    share a --ledger-redis-url tell students of one another by it. Without it, the address bound; one that is bound to
    all interfaces (0.0.0.0, ::) has no such address, and is not told of."""

    def address(self, port: int) -> str:
        """host:port, an IPv6 host in brackets."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"


class TracingConfig(BaseModel, use_attribute_docstrings=True):
    """Where spans go."""

    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^/?#@\s]+/?$")
    """OpenTelemetry collector that is sent a trace of each call: http://HOST:4317, or https:// for TLS (OTLP over gRPC;
    its headers and certificates are given in OpenTelemetry's own OTEL_... variables). Needs the [tracing] extra.
    Without it no span is made."""


class TlsConfig(BaseModel, use_attribute_docstrings=True):
    """How both ports are encrypted. Each handshake takes the files as they are."""

    tls_certificate_file: Path | None = None
    """The server's certificate, with those between it and its CA behind it (PEM). Without it, clear text."""
    tls_key_file: Path | None = None
    """The certificate's key (PEM, not encrypted)."""
    tls_client_ca_file: Path | None = None
    """CAs (PEM). With it, clients must show a certificate that one of them has signed, beside their token."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.tls_certificate_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_certificate_file and tls_key_file: give both, or neither")
        if self.tls_client_ca_file and self.tls_certificate_file is None:
            raise ValueError("tls_client_ca_file: needs --tls-certificate-file and --tls-key-file")
        return self


class ReplicasConfig(BaseModel, use_attribute_docstrings=True):
    """How many replicas a Ray cluster serves, and what each is given there."""

    ray_address: str | None = None
    """The cluster, HOST:PORT; without it that of RAY_ADDRESS, or the one that this machine belongs to."""
    min_replicas: int = Field(default=1, ge=1)
    """Replicas that there are always."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Replicas that there may be; without it, as many as --min-replicas."""
    target_queue_milliseconds: float = Field(default=100.0, gt=0)
    """How long queries may wait for the device, on average over 5 s: beyond it replicas are added."""
    scale_down_seconds: float = Field(default=60.0, ge=1)
    """For how long queries must wait half of that at most, and the devices have time for it, before one is drained."""
    gpus_per_replica: float | None = Field(default=None, ge=0)
    """GPUs, or a part of one; without it 1 where --device is cuda, or auto and the cluster has some, else 0."""
    cpus_per_replica: float = Field(default=1.0, gt=0)
    """CPUs, as Ray counts them; its threads too, unless --threads says otherwise."""
    metrics_targets: Path | None = None
    """Folder of this machine in which Prometheus is told of all replicas' HTTP ports (file_sd), by a file that is
    removed at the end. Made where it is missing."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas: {self.max_replicas} is less than --min-replicas {self.min_replicas}; give one as large"
            )
        return self


class ServeSettings(
    ModelConfig,
    EngineConfig,
    BatcherConfig,
    StoreConfig,
    CacheConfig,
    LedgerConfig,
    NetworkConfig,
    TlsConfig,
    TracingConfig,
    Settings,
    env_prefix="TEACHER_",
):
    """Serve a teacher over gRPC and HTTP.

    Every option is also an environment variable (TEACHER_MAX_BATCH_SIZE) and a key of the TOML file given by
    --config; the command line wins over the environment, the environment over the file.
    """

    keys_of_others = ReplicasConfig.model_fields


class ServeOnRaySettings(ReplicasConfig, ServeSettings, env_prefix="TEACHER_"):
    """Serve a teacher by replicas on a Ray cluster, as many as queries need.

    Each is a server like that of `serve`, with its own ports, and a folder of its own in --state-directory; students
    find all of them by one. Both Redis URLs are needed. One with a password is not sent through Ray: it must stand in
    the environment of `ray start` on each node (TEACHER_LEDGER_REDIS_URL), or in the file that --config names there.
    Paths but --metrics-targets are those of the nodes. On SIGTERM all are drained.
    """

    grpc_port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free port; another needs a single replica."""
    http_port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free port; another needs a single replica."""

    @model_validator(mode="after")
    def _one_port_each(self) -> Self:
        if (self.max_replicas or self.min_replicas) == 1:
            return self
        for name in ("grpc_port", "http_port"):
            if port := getattr(self, name):
                raise ValueError(f"{name}: {port} can be one replica's alone; give 0, for free ones")
        if self.advertise_address and re.search(r":\d+$", self.advertise_address):
            raise ValueError(
                f"advertise_address: {self.advertise_address} can be one replica's alone; leave out the port, or all "
                "of it for each node's own address"
            )
        return self


class DoctorSettings(ServeSettings, env_prefix="TEACHER_"):
    """Check what serving with these settings would meet, and say how to mend it.

    Nothing is served or written. The teacher is loaded and answers one full batch, on the device that would serve.
    Exit status 1 where there is a problem.
    """
