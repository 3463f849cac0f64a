"""A teacher's replicas on a Ray cluster, one actor each (ray_replicas.py), and who sees to their number.

`teacher-server serve-on-ray` runs a Fleet: as many replicas as queries need (scaling.py), one task for each. Ray places
them and says when one has died. They end with the command; what they had under way when it is killed is what any crash
leaves.
"""

import asyncio
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from protos.targets import Targets
from teacher_server.config import ServeOnRaySettings
from teacher_server.ray_replicas import Replica, ReplicaFailed, Serving, what_ray_may_know
from teacher_server.scaling import Load, Moment, Policy, moment, queue_seconds, wanted

_TICK_SECONDS = 1.0
_PATIENCE_SECONDS = 30.0  # for an actor that says nothing, which is then replaced
_PLACED_SECONDS = 10.0  # after which we say what a replica is waiting for
_PAUSE_SECONDS = (1.0, 60.0)  # before the next one, after so many have failed one after another
_log = logging.getLogger(__name__)
_ray: Any = ray  # which annotates itself in part only


@dataclass(eq=False)
class _Member:
    """One replica, from the wish for it to its end."""

    slot: int
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    serving: Serving | None = None
    load: Load | None = None
    task: asyncio.Task[None] | None = None
    scraped_at: str = ""
    """While it serves, and until it has drained."""


class Fleet:
    """Keeps as many replicas as are wanted, and says how many those are. For one event loop."""

    def __init__(
        self, settings: ServeOnRaySettings, say: Callable[[str], None], targets: Targets | None = None
    ) -> None:
        """`say`: is called with a line for people and scripts when a replica is ready, or has been drained.
        `targets`: where Prometheus is told of them."""
        self._settings, self._say, self._targets = settings, say, targets
        self._policy = Policy(
            minimum=settings.min_replicas,
            maximum=settings.max_replicas or settings.min_replicas,
            target_seconds=settings.target_queue_milliseconds / 1000,
            down_seconds=settings.scale_down_seconds,
        )
        self._given = what_ray_may_know(settings)
        self._actor = _ray.remote(Replica).options(
            num_cpus=settings.cpus_per_replica, num_gpus=_gpus(settings), max_restarts=0
        )
        self._members: list[_Member] = []
        self._failures = 0
        self._failed_last = self._not_before = -math.inf
        self._fingerprint: str | None = None
        self._fault: Exception | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Until stopped; then all are drained. Raises ReplicaFailed where the first ones cannot serve."""
        number, moments = self._policy.minimum, list[Moment]()
        before: dict[_Member, Load] = {}
        last = time.monotonic()
        try:
            while not stop.is_set() and self._fault is None:
                self._keep(number)
                await _waited(stop, _TICK_SECONDS)
                now = time.monotonic()
                loads = {member: member.load for member in self._members if member.load and not member.stop.is_set()}
                if loads.keys() != before.keys():
                    moments.clear()
                elif loads:
                    moments.append(moment(now - last, [(before[member], load) for member, load in loads.items()]))
                    del moments[: -int(10 + self._policy.down_seconds / _TICK_SECONDS)]
                    number = self._decided(number, len(loads), moments)
                before, last = loads, now
        finally:
            for member in self._members:
                member.stop.set()
            await asyncio.gather(*(member.task for member in self._members if member.task))
        if self._fault is not None:
            raise self._fault

    def _decided(self, number: int, serving: int, moments: list[Moment]) -> int:
        better = wanted(number, serving, moments, self._policy)
        if better != number:
            _log.info(
                "%d replicas wanted instead of %d, of which %d serve: queries waited %.0f ms of late",
                better,
                number,
                serving,
                1000 * queue_seconds(moments[-int(self._policy.up_seconds / _TICK_SECONDS) :]),
            )
        return better

    def _keep(self, number: int) -> None:
        """Asks for those that are missing, and gives up those that are too many: first who does not serve yet."""
        here = [member for member in self._members if not member.stop.is_set()]
        here.sort(key=lambda member: (member.serving is None, member.slot))
        for member in here[number:]:
            member.stop.set()
        if time.monotonic() < self._not_before:
            return
        for _ in range(number - len(here)):
            taken = {member.slot for member in self._members}
            member = _Member(next(slot for slot in range(len(taken) + 1) if slot not in taken))
            self._members.append(member)
            member.task = asyncio.create_task(self._live(member))

    async def _live(self, member: _Member) -> None:
        actor = self._actor.remote(member.slot, self._given)
        try:
            await self._serve(member, actor)
        except (RayError, ReplicaFailed, TimeoutError) as error:
            self._failed(member, error)
        except Exception as error:  # noqa: BLE001 - ours, or nobody reads what we say: the next would fare no better
            self._fault = error
        finally:
            _ray.kill(actor)
            self._members.remove(member)
            self._tell_prometheus()

    async def _serve(self, member: _Member, actor: Any) -> None:
        serving = await self._started(member, actor)
        if serving is None:
            return
        if serving.fingerprint != (self._fingerprint or serving.fingerprint):
            await self._drained(actor)
            raise ReplicaFailed(
                f"its teacher is {serving.fingerprint}, that of the others {self._fingerprint}: its node has another "
                "file of weights, or another version of the model; give all nodes the same"
            )
        self._fingerprint = serving.fingerprint
        member.scraped_at = serving.scraped_at
        self._tell_prometheus()
        self._say(
            f"replica {member.slot} ready, grpc {serving.grpc_address}, http {serving.http_address}, teacher "
            f"{serving.teacher} ({serving.fingerprint}), {serving.megaflops:.1f} MFLOPs a sample"
        )
        while not member.stop.is_set():
            load: Load | None = await asyncio.wait_for(_reply(actor.load.remote()), _PATIENCE_SECONDS)
            if load is None:
                raise ReplicaFailed("its device is lost")
            member.serving, member.load = serving, load
            await _waited(member.stop, _TICK_SECONDS)
        await self._drained(actor)
        self._say(f"replica {member.slot} drained")

    def _tell_prometheus(self) -> None:
        if self._targets is None:
            return
        try:
            self._targets.write([member.scraped_at for member in self._members if member.scraped_at])
        except OSError as error:  # the replicas serve all the same
            _log.warning("metrics_targets: Prometheus is not told that a replica came or went: %s", error)

    async def _drained(self, actor: Any) -> None:
        seconds = self._settings.shutdown_delay_seconds + self._settings.drain_seconds
        await asyncio.wait_for(_reply(actor.drain.remote()), seconds + _PATIENCE_SECONDS)

    async def _started(self, member: _Member, actor: Any) -> Serving | None:
        """What it says once it serves; None where it is not wanted any more before that."""
        ready = asyncio.ensure_future(_reply(actor.serve.remote()))
        given_up = asyncio.create_task(member.stop.wait())
        try:
            patience: float | None = _PLACED_SECONDS
            while not ready.done() and not given_up.done():
                await asyncio.wait((ready, given_up), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if patience and not ready.done() and not given_up.done():
                    _log.info(
                        "replica %d does not serve yet: it loads, or waits for %g CPUs and %g GPUs of one node",
                        member.slot,
                        self._settings.cpus_per_replica,
                        _gpus(self._settings),
                    )
                    patience = None
            return ready.result() if ready.done() else None
        finally:
            given_up.cancel()
            ready.cancel()

    def _failed(self, member: _Member, error: Exception) -> None:
        said = str(error).strip().splitlines() or [f"silent for {_PATIENCE_SECONDS:g} s"]
        if self._fingerprint is None:  # the others would fare no better
            self._fault = error if isinstance(error, ReplicaFailed) else ReplicaFailed(f"{said[0]} {said[-1]}")
            return
        now = time.monotonic()
        self._failures = self._failures + 1 if now - self._failed_last < 2 * _PAUSE_SECONDS[1] else 0
        self._failed_last = now
        pause = min(_PAUSE_SECONDS[0] * 2 ** min(self._failures, 10), _PAUSE_SECONDS[1])
        self._not_before = now + pause
        _log.warning("replica %d is lost, another in %g s: %s: %s", member.slot, pause, type(error).__name__, said[0])


def _gpus(settings: ServeOnRaySettings) -> float:
    if settings.gpus_per_replica is not None:
        return settings.gpus_per_replica
    some = settings.device == "cuda" or (settings.device == "auto" and _ray.cluster_resources().get("GPU", 0) > 0)
    return 1.0 if some else 0.0


async def _reply(reference: Any) -> Any:
    """What an actor's call gives, as a coroutine. A failure that is ours comes as itself."""
    try:
        return await reference
    except RayError as error:
        if isinstance(cause := getattr(error, "cause", None), ReplicaFailed):
            raise cause from None
        raise


async def _waited(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def serve_on_ray(settings: ServeOnRaySettings) -> int:
    """Until SIGTERM or SIGINT; the exit status. Raises ValueError or OSError for a cluster that is not there, and
    ReplicaFailed for replicas that cannot serve."""
    address = settings.ray_address or os.environ.get("RAY_ADDRESS") or "auto"
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit():  # where nobody listens Ray would try for two minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
    except OSError as error:  # Ray's ConnectionError is one
        said = str(error).strip().partition("\n")[0]
        raise OSError(
            f"ray_address: no Ray cluster at {address} ({said}); `ray start --head` there, or another --ray-address"
        ) from error
    try:
        asyncio.run(_serve(settings))
    finally:
        ray.shutdown()
    return 0


async def _serve(settings: ServeOnRaySettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)  # in the place of Ray's own
    with Targets(settings.metrics_targets, "replicas") if settings.metrics_targets else nullcontext() as targets:
        await Fleet(settings, lambda line: print(f"teacher-server: {line}", flush=True), targets).run(stop)  # noqa: T201
