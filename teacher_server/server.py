"""One process that serves a teacher: loads it, opens both ports, drains when told to stop."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

from protos import teacher_pb2 as pb
from teacher_server import gauges
from teacher_server.access import Ended, log_call
from teacher_server.accounts import Books
from teacher_server.addresses import advertised, is_loopback, reach
from teacher_server.auth import Authenticator
from teacher_server.batcher import Batcher
from teacher_server.cache import AnswerCache
from teacher_server.config import ServeSettings
from teacher_server.engine import Engine
from teacher_server.flights import Flights
from teacher_server.grpc_app import GrpcApp
from teacher_server.http_app import HttpApp
from teacher_server.ledger import Ledger
from teacher_server.metrics import Metrics
from teacher_server.model import ModelError, load
from teacher_server.postings import Waste
from teacher_server.queues import Array
from teacher_server.registry import Registry
from teacher_server.scaling import Load
from teacher_server.service import Served, Service
from teacher_server.store import Store, StoreUnavailable, capacity, open_stores
from teacher_server.tls import Certificates

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunningServer:
    description: pb.TeacherDescription
    grpc_address: str
    http_address: str
    device_lost: asyncio.Event
    load: Callable[[], Load]


@asynccontextmanager
async def teacher_server(settings: ServeSettings) -> AsyncIterator[RunningServer]:
    """Ready to answer once entered. Leaving drains: not ready, refuse (after a delay), finish what is queued, close.

    Raises ValueError for settings that cannot be served (a public address without tokens), ModelError for a teacher
    that does not load, OSError for a port that is taken.
    """
    metrics = Metrics()
    authenticator, certificates = _guards(settings, metrics)
    device_lost = asyncio.Event()
    loop = asyncio.get_running_loop()

    async with AsyncExitStack() as stack:
        stores = await stack.enter_async_context(open_stores(settings, settings.cache_max_bytes))
        books = Books(stores.ledger)
        service = Service(metrics, books)
        metrics.watch(gauges.readiness(lambda: service.not_ready))
        metrics.watch(gauges.stores(stores))
        http = await stack.enter_async_context(
            HttpApp(service, authenticator, metrics, settings, books, certificates=certificates)
        )
        grpc = await stack.enter_async_context(
            GrpcApp(
                service,
                authenticator,
                metrics,
                settings,
                max_tenant_bytes=settings.max_tenant_queue_bytes,
                certificates=certificates,
                on_end=stack.enter_context(watched(settings.otlp_endpoint)),
            )
        )

        def lose_device() -> None:
            service.drain("the device is lost")
            loop.call_soon_threadsafe(device_lost.set)

        _log.info("loading %s from %s", settings.model, settings.weights)
        teacher = await asyncio.to_thread(load, settings, settings)
        description = teacher.description
        description.limits.CopyFrom(_limits(settings))
        engine = Engine(
            teacher.module,
            description,
            settings,
            settings.max_batch_size,
            on_out_of_memory=metrics.device_errors.labels("out_of_memory").inc,
        )
        metrics.watch(gauges.teacher(description, settings, engine))
        ledger = await stack.enter_async_context(_ledger(stores.ledger, settings, description, metrics))
        books.post = ledger.post
        metrics.watch(gauges.budgets(ledger.states))
        metrics.watch(gauges.ledger(ledger.state))
        await _warm_up(engine, ledger, metrics, settings)
        cache = await stack.enter_async_context(
            AnswerCache(
                stores.cache,
                settings,
                description.outputs[0].shape[0],
                metrics,
                capacity=await capacity(stores.cache),
            )
        )
        batcher = stack.enter_context(
            Batcher(
                settings,
                engine.forward,
                forwarding=ledger.forwarding,
                on_batch=lambda *batch: flights.on_batch(*batch),  # noqa: PLW0108 - they come next
                on_device_lost=lose_device,
                busy_clock=lambda: engine.busy_nanoseconds,
            )
        )
        flights = await stack.enter_async_context(Flights(batcher, cache, ledger, metrics, description))
        metrics.watch(gauges.queue(batcher, metrics))
        service.serve(Served(description, batcher, cache, flights, ledger))
        grpc.set_serving(True)
        registry = _registry(stores.ledger, settings, description, grpc.port)
        service.registry = registry
        metrics.watch(gauges.replicas(lambda: registry.alike() if registry else 0))
        try:
            async with _told_of(service, grpc, registry, device_lost, settings.shutdown_delay_seconds):
                yield RunningServer(
                    description,
                    settings.address(grpc.port),
                    settings.address(http.port),
                    device_lost,
                    load=lambda: Load(*metrics.queued(), engine.busy_nanoseconds / 1e9, sum(batcher.depth().values())),
                )
        finally:
            await _drain(service, grpc, batcher, settings.drain_seconds)


@asynccontextmanager
async def _told_of(
    service: Service, grpc: GrpcApp, registry: Registry | None, device_lost: asyncio.Event, delay: float
) -> AsyncIterator[None]:
    """Students and balancers are sent here. Left, they are sent elsewhere, and for `delay` seconds nothing is refused
    to those who have not heard it; a lost device has nothing to give them."""
    async with registry or nullcontext():
        try:
            yield
        finally:
            service.leave(service.not_ready or "draining")
            grpc.set_serving(False)
    with suppress(TimeoutError):
        await asyncio.wait_for(device_lost.wait(), delay)


async def _drain(service: Service, grpc: GrpcApp, batcher: Batcher, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    service.drain("draining")
    batcher.drain()
    _log.info("draining %d waiting samples, at most %g s", sum(batcher.depth().values()), seconds)
    with suppress(TimeoutError):
        await asyncio.wait_for(grpc.idle(), seconds)
    finished = await asyncio.to_thread(batcher.close, max(0.0, end - loop.time()))
    _log.info("drained" if finished else "gave up draining; what was left is refused")


def _guards(settings: ServeSettings, metrics: Metrics) -> tuple[Authenticator, Certificates | None]:
    """Who may come in, and by which certificate they know us. Raises OSError or ValueError for unusable files, and
    ValueError where anybody could come in from outside."""
    authenticator = Authenticator.from_file(
        settings.tokens_file,
        failed=lambda reason: metrics.authentication_failures.labels(reason).inc(),
        stale=metrics.reload_failed.labels("tokens").set,
    )
    certificates = Certificates.of(settings, metrics.reload_failed.labels("certificates").set)
    if is_loopback(settings.host):
        return authenticator, certificates
    if settings.tokens_file is None:
        raise ValueError(
            f"host: {settings.host} can be reached from outside and there are no tokens; "
            "give --tokens-file, or bind 127.0.0.1"
        )
    if certificates is None:
        _log.warning(
            "tokens and samples travel in clear on %s: give --tls-certificate-file and --tls-key-file, or put nothing "
            "between that may not read them",
            settings.host,
        )
    return authenticator, certificates


@contextmanager
def watched(otlp_endpoint: str | None) -> Iterator[Callable[[Ended], None]]:
    """What is called with each call that ended: the access log, and the spans where somebody collects them."""
    if otlp_endpoint is None:
        yield log_call
        return
    try:
        from teacher_server.spans import Spans  # noqa: PLC0415 - an extra, which nobody else needs
    except ModuleNotFoundError as error:
        raise ValueError(
            f"otlp_endpoint: {otlp_endpoint} needs OpenTelemetry ({error}); install Preceptor with its [tracing] "
            "extra, or leave out --otlp-endpoint"
        ) from error
    with Spans(otlp_endpoint) as spans:

        def ended(call: Ended) -> None:
            log_call(call)
            spans.ended(call)

        yield ended


def _limits(settings: ServeSettings) -> pb.Limits:
    return pb.Limits(
        max_message_bytes=settings.max_message_bytes,
        max_samples_per_query=min(
            settings.max_samples_per_query, settings.max_queue_size, settings.max_tenant_queue_size
        ),
        max_batch_size=settings.max_batch_size,
    )


@asynccontextmanager
async def _ledger(
    store: Store, settings: ServeSettings, teacher: pb.TeacherDescription, metrics: Metrics
) -> AsyncIterator[Ledger]:
    who = f"serve:{socket.gethostname()}"
    try:
        ledger = Ledger(store, settings, settings.state_directory / "journal", teacher, who=who)
        await ledger.__aenter__()
    except StoreUnavailable as error:
        raise OSError(f"{error}; start it, or give another --ledger-redis-url") from error
    try:
        # The forward pass that measured its FLOPs, before anybody could note that it began.
        ledger.book(ledger.forwarding(1), [], [Waste("own/load", 1, 0)])
        metrics.platform.labels("own", "load").inc()
        yield ledger
    finally:
        await ledger.__aexit__()


def _registry(store: Store, settings: ServeSettings, teacher: pb.TeacherDescription, grpc_port: int) -> Registry | None:
    """Its place among the replicas of a shared ledger; None where there are no others, or students could not come."""
    if settings.ledger_redis_url is None:
        return None
    address = advertised(settings, grpc_port)
    if address is None:
        _log.warning(
            "students are not told of this replica, which is bound to all interfaces (%s): give --advertise-address, "
            "where they can reach it",
            settings.host,
        )
        return None
    replica = pb.Replica(address=address, teacher=teacher.name, fingerprint=teacher.fingerprint)
    return Registry(store, replica, reach(address))


async def _warm_up(engine: Engine, ledger: Ledger, metrics: Metrics, settings: ServeSettings) -> None:
    """What it forwards is our own. Raises ModelError."""
    passes = []

    def forward(inputs: dict[str, Array]) -> None:
        samples, busy = len(next(iter(inputs.values()))), engine.busy_nanoseconds
        number = ledger.forwarding(samples)
        try:
            engine.forward(inputs)
        finally:
            passes.append((number, samples, engine.busy_nanoseconds - busy))

    try:
        await asyncio.to_thread(engine.warm_up, forward)
    except Exception as error:
        raise ModelError(f"model: {settings.model} failed in warm-up: {type(error).__name__}: {error}") from error
    finally:
        for number, samples, nanoseconds in passes:
            ledger.book(number, [], [Waste("own/warm-up", samples, nanoseconds)])
            metrics.platform.labels("own", "warm-up").inc(samples)


async def serve(settings: ServeSettings) -> int:
    """Serves until SIGTERM or SIGINT (status 0), or until the device is lost (status 1).

    Until the teacher is loaded nobody waits for an answer, and signals end the process at once, also as PID 1.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, os._exit, 128 + number)
    async with teacher_server(settings) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        print(  # noqa: T201 - the one line that says where the ports are, for people and scripts
            f"teacher-server: ready, grpc {server.grpc_address}, http {server.http_address}, "
            f"teacher {server.description.name} ({server.description.fingerprint}), "
            f"{server.description.flops_per_sample / 1e6:.1f} MFLOPs a sample",
            flush=True,
        )
        ends = [asyncio.create_task(event.wait()) for event in (stop, server.device_lost)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
    return 1 if server.device_lost.is_set() else 0
