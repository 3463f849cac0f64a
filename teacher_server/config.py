"""The server's knobs, one model per component. Only `__main__` reads the environment and the command line."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

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
    price_nanos: int = Field(default=0, ge=0)
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
    """Lines of `SHA256-OF-TOKEN TENANT`. Without it everyone is tenant `default`, on loopback only."""

    def address(self, port: int) -> str:
        """host:port, an IPv6 host in brackets."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"


class ServeSettings(ModelConfig, EngineConfig, BatcherConfig, NetworkConfig, Settings, env_prefix="TEACHER_"):
    """Serve a teacher over gRPC and HTTP.

    Every option is also an environment variable (TEACHER_MAX_BATCH_SIZE) and a key of the TOML file given by
    --config; the command line wins over the environment, the environment over the file.
    """
