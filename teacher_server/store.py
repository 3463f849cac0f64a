"""The two Redis databases: the cache, which may forget, and the ledger, which must not.

    store.command(...)   one command; all callers' go out together (pipeline.py)
    store.script(...)    a Lua script, by its hash
    store.durable()      since and until when what was acknowledged is on Redis's disk
    open_stores          both, with an embedded Valkey where no URL is given (embedded.py)
    open_ledger          the ledger alone, for the command line

Every key of ours begins with one of the prefixes below.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from redis.exceptions import NoScriptError, ResponseError

from teacher_server.config import StoreConfig
from teacher_server.embedded import embedded, socket_url, take_lock, write_pid
from teacher_server.pipeline import SILENCE_SECONDS, Part, Pipeline, StoreUnavailable

__all__ = [
    "CACHE_PREFIX",
    "LEDGER_PREFIX",
    "REPLICAS_PREFIX",
    "Store",
    "StoreUnavailable",
    "Stores",
    "capacity",
    "check_ledger",
    "open_ledger",
    "open_stores",
]

# The number is that of the codec: what another one wrote is not read.
CACHE_PREFIX = "preceptor:cache:1:"
LEDGER_PREFIX = "preceptor:ledger:1:"
REPLICAS_PREFIX = "preceptor:replicas:1:"  # in the ledger's Redis, and no part of the ledger (registry.py)

_FSYNC_SECONDS = 5.0  # appendfsync everysec writes after 2 s at the latest, and syncs within another or two
_log = logging.getLogger(__name__)


class Store(Pipeline):
    """One Redis, as the cache and the ledger use it."""

    async def script(self, text: str, *arguments: Part) -> Any:
        """The reply of a Lua script that names its keys itself, in ARGV. It runs at most once. Raises as `command`."""
        try:
            return await self.command("EVALSHA", _sha1(text), 0, *arguments)
        except NoScriptError:  # never seen here, or forgotten in a restart
            return await self.command("EVAL", text, 0, *arguments)

    async def info(self) -> dict[str, str]:
        """What INFO says, without its headings. Raises as `command`."""
        lines = (await self.command("INFO")).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    async def durable(self) -> tuple[float, float]:
        """Two moments, in time.time(): what was acknowledged between them is on Redis's disk. Raises as `command`.

        What was acknowledged before the first, when the present connection was made, is not known to be: Redis may have
        lost it with that connection; have it acknowledged anew. The second is the present, after up to 2 s of waiting,
        where Redis knows WAITAOF (7.2, Valkey). Otherwise it is 5 s ago, which an fsync that takes seconds could still
        disprove; without an append-only file, the last snapshot.
        """
        now = time.time()
        info = await self.info()
        if int(info["aof_enabled"]):
            last = await self._durable_by_append(info, now)
        else:
            began = int(info["rdb_last_save_time"]) - max(0, int(info["rdb_last_bgsave_time_sec"])) - 1
            last = now - (int(info["server_time_usec"]) / 1e6 - began)
        return self.connected_since, last  # read last: if we had to connect again meanwhile, nothing is known

    async def _durable_by_append(self, info: dict[str, str], now: float) -> float:
        wait, never = SILENCE_SECONDS, 0.0
        try:
            # WAITAOF waits for its own connection's last write, so there must be one. The run id, since behind one
            # address there may by now be another server than the one that acknowledged.
            there, _, (synced, _) = await self.apart(
                ("INFO", "server"),
                ("SET", f"{LEDGER_PREFIX}on-disk", now),
                ("WAITAOF", 1, 0, int(1000 * wait)),
                within=wait,
            )
        except ResponseError:  # unknown, or not allowed
            pass
        else:
            return now if synced and f"run_id:{info['run_id']}" in there.decode() else never
        with suppress(ResponseError):
            if (await self.command("CONFIG", "GET", "appendfsync"))[1:] == [b"no"]:
                return never
        busy = any(
            int(info[key]) for key in ("aof_pending_bio_fsync", "aof_rewrite_in_progress", "aof_rewrite_scheduled")
        )
        return never if busy or info["aof_last_write_status"] != "ok" else now - _FSYNC_SECONDS


@lru_cache
def _sha1(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Stores:
    cache: Store
    ledger: Store


@asynccontextmanager
async def open_stores(config: StoreConfig, cache_max_bytes: int) -> AsyncIterator[Stores]:
    """Both stores, for the one server that the state directory has; an embedded Valkey for each that has no URL.

    Raises ValueError for a state directory in use, a URL that is none, or a Redis that would lose the ledger; OSError
    for a directory that cannot be used, or a Redis that is not reached.
    """
    async with AsyncExitStack() as stack:
        stack.enter_context(_held(config.state_directory))

        async def url(given: SecretStr | None, name: str, max_bytes: int | None) -> str:
            if given is not None:
                return given.get_secret_value()
            valkey = embedded(config.state_directory / name, name, persistent=max_bytes is None, max_bytes=max_bytes)
            return await stack.enter_async_context(valkey)

        urls = await asyncio.gather(
            url(config.cache_redis_url, "cache", cache_max_bytes),
            url(config.ledger_redis_url, "ledger", None),
            return_exceptions=True,  # so that the other one is there to be ended
        )
        for found in urls:
            if isinstance(found, BaseException):
                raise found
        cache, ledger = (Store(str(found), what) for found, what in zip(urls, ("cache", "ledger"), strict=True))
        stores = Stores(await stack.enter_async_context(cache), await stack.enter_async_context(ledger))
        await check_ledger(stores.ledger)
        yield stores


@asynccontextmanager
async def open_ledger(config: StoreConfig) -> AsyncIterator[Store]:
    """The ledger, beside a running server or without one. Raises as `open_stores`, and ValueError for none."""
    async with AsyncExitStack() as stack:
        if config.ledger_redis_url is not None:
            url = config.ledger_redis_url.get_secret_value()
        else:
            directory = config.state_directory / "ledger"
            if not (directory / "appendonlydir").is_dir():
                raise ValueError(
                    f"state_directory: {config.state_directory} holds no ledger; give the server's --state-directory, "
                    "or its --ledger-redis-url"
                )
            try:
                stack.enter_context(_held(config.state_directory))
            except _InUse:
                url = stack.enter_context(socket_url(directory, "ledger"))
            else:
                url = await stack.enter_async_context(embedded(directory, "ledger", persistent=True, max_bytes=None))
        ledger = await stack.enter_async_context(Store(url, "ledger"))
        await check_ledger(ledger)
        yield ledger


class _InUse(ValueError):
    pass


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = take_lock(directory / "lock")
    except BlockingIOError:
        pid = (directory / "lock").read_text().strip() or "unknown"
        raise _InUse(
            f"state_directory: {directory} is in use by another server (pid {pid}); give another --state-directory"
        ) from None
    except OSError as error:
        raise OSError(
            f"state_directory: cannot use {directory} ({error.strerror}); give another --state-directory"
        ) from None
    try:
        write_pid(lock, os.getpid())
        yield
    finally:
        os.close(lock)


async def check_ledger(store: Store) -> None:
    """Refuses a Redis that would lose spend: one that evicts, keeps nothing on disk, or is too old.

    Raises ValueError naming what to change, OSError where it has gone again. Warns of one that loses more than a
    second or two in a crash.
    """
    info = await _info(store)
    where = f"ledger: {store.where}"
    if int(info["redis_version"].split(".")[0]) < 7:
        raise ValueError(f"{where} is Redis {info['redis_version']}; 7.0 or later is needed, or Valkey")
    if int(info["maxmemory"]) and info["maxmemory_policy"] != "noeviction":
        raise ValueError(
            f"{where} would drop spend when its memory is full (maxmemory-policy {info['maxmemory_policy']}); there, "
            "CONFIG SET maxmemory-policy noeviction"
        )
    try:
        reply = await store.command("CONFIG", "GET", "appendfsync", "save")
        settings = dict(zip(reply[::2], reply[1::2], strict=True))
    except ResponseError:  # not allowed on managed servers
        settings = {}
    if int(info["aof_enabled"]):
        if settings.get(b"appendfsync") == b"no":
            _log.warning("%s syncs its file when it likes; there, CONFIG SET appendfsync everysec", where)
    elif settings.get(b"save") == b"":
        raise ValueError(f"{where} writes nothing to disk; there, CONFIG SET appendonly yes, and in its file")
    else:
        _log.warning("%s has no append-only file, a crash loses what came after its last snapshot", where)


async def capacity(store: Store) -> int | None:
    """Bytes that the cache's Redis may use; None, and a warning, where it has no bound. Raises as `check_ledger`."""
    info = await _info(store)
    limit = int(info["maxmemory"])
    if not limit:
        _log.warning("%s: %s has no maxmemory and grows without bound; CONFIG SET it there", store.what, store.where)
        return None
    if info["maxmemory_policy"] == "noeviction":
        _log.warning(
            "%s: %s keeps nothing new when it is full; there, CONFIG SET maxmemory-policy allkeys-lru",
            store.what,
            store.where,
        )
    return limit


async def _info(store: Store) -> dict[str, str]:
    try:
        return await store.info()
    except ResponseError as error:
        raise ValueError(
            f"{store.what}: {store.where} does not tell what it is ({error}); there, allow the URL's user INFO"
        ) from error
    except StoreUnavailable as error:
        raise OSError(f"{error}; start it, or give another --{store.what}-redis-url") from error
