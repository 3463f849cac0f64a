"""The server's knobs, one model per component. Only `__main__` reads the environment and the command line."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, SecretStr

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
    drain_seconds: float = Field(default=30.0, ge=0)
    """After SIGTERM: how long queued queries may take to finish; what is left then is refused and the process exits."""
    tokens_file: Path | None = None
    """Lines of `SHA256-OF-TOKEN TENANT`, with `admin` behind it for those who set budgets and see all spend. Without
    the file everyone is tenant `default` and may do everything, on loopback only."""

    def address(self, port: int) -> str:
        """host:port, an IPv6 host in brackets."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"


class ServeSettings(
    ModelConfig,
    EngineConfig,
    BatcherConfig,
    StoreConfig,
    CacheConfig,
    LedgerConfig,
    NetworkConfig,
    Settings,
    env_prefix="TEACHER_",
):
    """Serve a teacher over gRPC and HTTP.

    Every option is also an environment variable (TEACHER_MAX_BATCH_SIZE) and a key of the TOML file given by
    --config; the command line wins over the environment, the environment over the file.
    """
