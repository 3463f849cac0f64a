"""What a ledger may be kept in, and what is on its disk: on real servers."""

import asyncio
import time

import pytest

from teacher_server.store import (
    LEDGER_PREFIX,
    Store,
    StoreUnavailable,
    capacity,
    check_ledger,
    open_ledger,
    open_stores,
)
from tests.redis_servers import AOF, DEBIAN, config, eventually, needs_debian, running

# ---------------------------------------------------------------- what a ledger may be kept in


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru", *AOF),
            r"allkeys-lru.*maxmemory-policy noeviction",
        ),
        ((), "writes nothing to disk; there, CONFIG SET appendonly yes"),
    ],
)
def test_a_redis_that_loses_spend_is_refused(tmp_path, options, problem):
    async def main():
        with running(tmp_path / "valkey", *options) as server:
            with pytest.raises(ValueError, match=f"ledger: .*{problem}"):
                async with open_ledger(config(tmp_path, ledger_redis_url=server.url)):
                    pass
            with pytest.raises(ValueError, match=problem):
                async with open_stores(
                    config(tmp_path, cache_redis_url=server.url, ledger_redis_url=server.url), 2**20
                ):
                    pass

    (tmp_path / "valkey").mkdir()
    asyncio.run(main())


def test_a_redis_that_may_lose_spend_is_warned_of(tmp_path, caplog):
    async def warnings(*options, managed=False):
        caplog.clear()
        with running(tmp_path, *options) as server:
            async with Store(server.url, "ledger") as store:
                if managed:
                    await store.command("ACL", "SETUSER", "default", "-config")
                await check_ledger(store)
        return " ".join(record.getMessage() for record in caplog.records)

    assert asyncio.run(warnings("--maxmemory", "100mb", *AOF)) == ""
    assert "no append-only file" in asyncio.run(warnings("--save", "3600 1"))
    assert "no append-only file" in asyncio.run(warnings(managed=True))
    assert "CONFIG SET appendfsync everysec" in asyncio.run(warnings(*AOF, "--appendfsync", "no"))


def test_the_caches_capacity(tmp_path, caplog):
    async def main():
        with running(tmp_path, "--maxmemory", "10mb", "--maxmemory-policy", "allkeys-lru") as server:
            async with Store(server.url, "cache") as store:
                assert await capacity(store) == 10 * 2**20
                assert not caplog.records
                await store.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
                assert await capacity(store) == 10 * 2**20
                assert "keeps nothing new when it is full" in caplog.text
                await store.command("CONFIG", "SET", "maxmemory", 0)
                assert await capacity(store) is None
                assert "grows without bound" in caplog.text

    asyncio.run(main())


@pytest.mark.parametrize("look", [check_ledger, capacity])
def test_a_redis_that_does_not_tell_what_it_is(tmp_path, look):
    async def main():
        with running(tmp_path, *AOF) as server:
            async with Store(server.url, "ledger") as store:
                await store.command("ACL", "SETUSER", "default", "-@dangerous")
                with pytest.raises(ValueError, match=r"ledger: .*redis\.sock .*'info' command.*allow .* INFO"):
                    await look(store)
                server.kill()  # since it was connected: loading a teacher takes its time
                await eventually(lambda: not store.available)
                with pytest.raises(OSError, match=r"ledger: no answer from .*redis\.sock .*--ledger-redis-url"):
                    await look(store)

    asyncio.run(main())


# ---------------------------------------------------------------- what is on the disk


def test_valkey_tells_what_is_on_its_disk(tmp_path):
    async def main():
        with running(tmp_path, *AOF) as server:
            async with Store(server.url, "ledger") as store:
                await store.command("SET", f"{LEDGER_PREFIX}x", 1)
                acknowledged = time.time()
                first, last = await store.durable()
                assert first <= acknowledged < last
                copy = (tmp_path / "appendonlydir").glob("*.incr.aof")
                assert b"preceptor:ledger:1:x" in next(copy).read_bytes()
                server.kill()
                await eventually(lambda: not store.available)
                with pytest.raises(StoreUnavailable):
                    await store.durable()
                server.start()
                await eventually(lambda: store.available)
                first, _ = await store.durable()
                assert acknowledged < first  # it was there; but who knows that, after a crash
                await store.command("CONFIG", "SET", "appendfsync", "no")
                assert (await store.durable())[1] == 0

    asyncio.run(main())


def test_snapshots_reach_as_far_as_when_they_began(tmp_path):
    async def main():
        with running(tmp_path, "--save", "3600 1000") as server:
            async with Store(server.url, "ledger") as store:
                await store.command("SET", "x", 1)
                acknowledged = time.time()
                assert (await store.durable())[1] < acknowledged
                await store.command("SAVE")
                saved = time.time()
                last = (await store.durable())[1]
                assert saved - 3 < last < saved  # INFO tells seconds; never too late

    asyncio.run(main())


@needs_debian
def test_redis_7_0_tells_what_is_on_its_disk_five_seconds_later(tmp_path):
    async def main():
        with running(tmp_path, *AOF, binary=DEBIAN) as server:
            async with Store(server.url, "ledger") as store:
                await check_ledger(store)
                await store.command("SET", "x", 1)
                acknowledged = time.time()
                while not (last := (await store.durable())[1]):  # noqa: ASYNC110 - while it syncs, it says nothing
                    await asyncio.sleep(0.05)
                assert acknowledged - 6 < last < acknowledged
                await store.command("CONFIG", "SET", "appendfsync", "no")
                assert (await store.durable())[1] == 0

    asyncio.run(main())
