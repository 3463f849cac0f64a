"""One replica as an actor of a Ray cluster: the server of `teacher-server serve`, placed and looked after from outside.

Ray keeps an actor's arguments and shows them, so no password is among them.
"""

import asyncio
import os
import re
import sys
from typing import Any, NamedTuple

import ray
from pydantic import SecretStr, ValidationError

from teacher_server.addresses import scraped
from teacher_server.config import ServeOnRaySettings
from teacher_server.log_lines import logging_to
from teacher_server.scaling import Load

_SECRETS = ("cache_redis_url", "ledger_redis_url")
_ray: Any = ray  # which annotates itself in part only


class Serving(NamedTuple):
    """What a replica says once it serves."""

    grpc_address: str
    http_address: str
    scraped_at: str
    """host:port of its HTTP port, for Prometheus."""
    teacher: str
    fingerprint: str
    megaflops: float


class Replica:
    """One server, on a node's event loop, as long as its actor lives."""

    def __init__(self, slot: int, given: dict[str, Any]) -> None:
        """`slot`: its number among those that serve, which names its folder. `given`: settings without secrets."""
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as `teacher-server` has it
        self._slot, self._given = slot, given
        self._stop = asyncio.Event()
        self._server: Any = None
        self._task: asyncio.Task[None] | None = None

    async def serve(self) -> Serving:
        """Returns once it answers. Raises ValueError, ModelError or OSError as `teacher_server` does."""
        ready: asyncio.Future[Serving] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._serve(ready))
        return await ready

    async def load(self) -> Load | None:
        """None where it can compute no more."""
        return None if self._server.device_lost.is_set() else self._server.load()

    async def drain(self) -> None:
        """Told of no more, then refuses, then finishes what is queued; returns when it has closed."""
        if self._task is not None:
            self._stop.set()
            await self._task

    async def _serve(self, ready: asyncio.Future[Serving]) -> None:
        # Here, since torch takes seconds and what places replicas has no use for it.
        from teacher_server.model import ModelError  # noqa: PLC0415
        from teacher_server.server import teacher_server  # noqa: PLC0415

        with logging_to(sys.stderr):
            try:
                settings = _settings_here(self._slot, self._given)
                async with teacher_server(settings) as server:
                    self._server = server
                    about = server.description
                    ports = (int(at.rpartition(":")[2]) for at in (server.grpc_address, server.http_address))
                    ready.set_result(
                        Serving(
                            server.grpc_address,
                            server.http_address,
                            scraped(settings, *ports),
                            about.name,
                            about.fingerprint,
                            about.flops_per_sample / 1e6,
                        )
                    )
                    await self._stop.wait()
            except Exception as error:
                if ready.done():
                    raise
                # As text: Ray pickles what is raised, and it may have come from anywhere.
                expected = isinstance(error, ModelError | ValueError | OSError)
                ready.set_exception(ReplicaFailed(str(error) if expected else f"{type(error).__name__}: {error}"))


class ReplicaFailed(Exception):
    """A replica cannot serve; the message is what `teacher-server serve` would have said."""


def what_ray_may_know(settings: ServeOnRaySettings) -> dict[str, Any]:
    """All that was set, as plain values; a URL only where it has no room for a password."""
    given: dict[str, Any] = settings.model_dump(mode="json", exclude_unset=True, exclude=set(_SECRETS))
    for name in _SECRETS:
        url: SecretStr | None = getattr(settings, name)
        if url is not None and not re.search("[@?]", url.get_secret_value()):
            given[name] = url.get_secret_value()
    return given


def _settings_here(slot: int, given: dict[str, Any]) -> ServeOnRaySettings:
    """With what this node's environment and file add. Raises ValueError."""
    node: str = _ray.util.get_node_ip_address()
    try:
        settings = ServeOnRaySettings(**given)
    except ValidationError as error:  # its own text would show the values
        said = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise ValueError(f"on node {node}: {said}") from None
    for name in _SECRETS:
        if getattr(settings, name) is None:
            raise ValueError(
                f"{name}: not set on node {node}; replicas share it, and Ray is told none that has a password: put "
                f"TEACHER_{name.upper()} into the environment of `ray start` there, or a file that --config names"
            )
    change: dict[str, Any] = {"state_directory": settings.state_directory / f"replica-{slot}"}
    if settings.advertise_address is None and settings.host in {"0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
        change["advertise_address"] = f"[{node}]" if ":" in node else node
    return settings.model_copy(update=change)
