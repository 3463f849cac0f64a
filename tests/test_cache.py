"""The cache of answers on a real Valkey: what is found, what is kept, what a job may fill, and life without Redis."""

import asyncio

import numpy as np
import pytest

from teacher_server.auth import Caller
from teacher_server.cache import AnswerCache
from teacher_server.config import CacheConfig
from teacher_server.metrics import Metrics
from teacher_server.store import CACHE_PREFIX, StoreUnavailable
from tests.batching import Clock
from tests.flying import DictStore, flying, valkey

A, B = Caller("a", "job"), Caller("b", "job")
CLASSES = 10


def cache_on(store, metrics=None, *, capacity=None, clock=None, classes=CLASSES, **config):
    return AnswerCache(
        store, CacheConfig(**config), classes, metrics or Metrics(), capacity=capacity, clock=clock or Clock()
    )


def sample_keys(*numbers):
    return [b"%016d" % number for number in numbers]


def answers(*numbers):
    return np.outer(numbers, np.linspace(0.1, 1, CLASSES)).astype(np.float32)


async def put(cache, caller, keys, logits, **options):
    """Whether it is kept, once it has been written."""
    written = asyncio.Event()
    kept = cache.put(caller, keys, logits, written.set, **options)
    if kept:
        await asyncio.wait_for(written.wait(), 20)
    return kept


def counted(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels or None) or 0


@flying
async def test_what_is_put_is_found_to_the_bit_and_the_first_answer_stays(tmp_path):
    metrics = Metrics()
    async with valkey(tmp_path) as store, cache_on(store, metrics, cache_ttl_seconds=1000) as cache:
        keys = cache.keys(A, "", sample_keys(*range(5)))
        assert await put(cache, A, keys[:3], answers(0, 1, 2))
        assert await put(cache, B, keys[2:4], answers(7, 3))
        found = await cache.get(keys)
        assert found.rows.tolist() == [0, 1, 2, 3]
        assert found.logits.tobytes() == answers(0, 1, 2, 3).tobytes()
        assert found.logits.dtype == np.float32
        assert counted(metrics, "preceptor_duplicate_samples_total") == 1
        assert (counted(metrics, "preceptor_cache_hits_total"), counted(metrics, "preceptor_cache_misses_total")) == (
            4,
            1,
        )
        assert await put(cache, B, keys[2:3], answers(9), overwrite=True)
        assert (await cache.get(keys[2:3])).logits.tobytes() == answers(9).tobytes()
        assert 990 < await store.command("TTL", keys[0]) <= 1000


@flying
async def test_golden_entry():
    """What another version of this program finds in Redis, and must read or refuse."""
    store = DictStore()
    async with cache_on(store, classes=2) as cache:
        keys = cache.keys(A, "", [b"k" * 16])
        await put(cache, A, keys, np.float32([[1.0, -2.5]]))
    assert keys == [b"preceptor:cache:1:s:kkkkkkkkkkkkkkkk"]
    assert store.entries[keys[0]].hex() == "010000803f000020c0" + "74eb3336c4153926"


@flying
async def test_scopes_do_not_meet(tmp_path):
    async with valkey(tmp_path) as store, cache_on(store) as shared, cache_on(store, cache_scope="tenant") as apart:
        (key,) = sample_keys(1)
        places = [
            *shared.keys(A, "", [key]),
            *apart.keys(A, "", [key]),
            *apart.keys(B, "", [key]),
            *shared.keys(A, "run", [key]),
            *shared.keys(B, "run", [key]),
            *shared.keys(A, "run:x", [key]),
        ]
        assert len(set(places)) == len(places)
        assert all(place.startswith(CACHE_PREFIX.encode()) and place.endswith(key) for place in places)
        assert shared.keys(A, "", [key]) == shared.keys(B, "", [key])
        assert shared.keys(A, "run", [key]) == apart.keys(A, "run", [key])
        await put(shared, A, places[:1], answers(1))
        assert len((await shared.get(places)).rows) == 1


@flying
async def test_what_is_not_exactly_an_entry_is_an_error_and_a_miss():
    metrics, store = Metrics(), DictStore()
    async with cache_on(store, metrics) as cache, cache_on(store, classes=5) as other:
        keys = cache.keys(A, "", sample_keys(*range(8)))
        await put(cache, A, keys, answers(*range(8)))
        good = dict(store.entries)
        await put(other, A, keys[1:2], answers(1)[:, :5], overwrite=True)  # a teacher of other classes
        store.entries[keys[2]] = good[keys[3]]
        store.entries[keys[3]] = b""
        store.entries[keys[4]] = good[keys[4]][:-1] + b"\0"
        store.entries[keys[5]] = b"\2" + good[keys[5]][1:]
        store.entries[keys[6]] = b"x" * 10_000
        bad = answers(7)
        bad[0, 3] = np.inf  # with a right checksum
        await put(cache, A, keys[7:], bad, overwrite=True)
        found = await cache.get(keys)
        assert found.rows.tolist() == [0]
        assert found.corrupt.tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert counted(metrics, "preceptor_cache_errors_total", kind="corrupt") == 7


@flying
async def test_large_queries_are_read_and_written_in_pieces(tmp_path):
    async with valkey(tmp_path, 256 * 2**20) as store, cache_on(store, classes=1000) as cache:
        keys = cache.keys(A, "", sample_keys(*range(4000)))
        logits = np.random.default_rng(0).standard_normal((4000, 1000), np.float32)  # 16 MB
        assert await put(cache, A, keys, logits)
        found = await cache.get(keys)
        np.testing.assert_array_equal(found.logits, logits)


@flying
async def test_many_large_lookups_at_once_push_out_nothing(tmp_path):
    async with valkey(tmp_path, 64 * 2**20) as store, cache_on(store, classes=1000) as cache:
        keys = cache.keys(A, "", sample_keys(*range(4000)))
        assert await put(cache, A, keys, np.ones((4000, 1000), np.float32))
        found = await asyncio.gather(*(cache.get(keys[:2000]) for _ in range(16)))  # 8 MB each
        assert [len(one.rows) for one in found] == [2000] * 16
        assert int((await store.info())["evicted_keys"]) == 0


@flying
async def test_the_smallest_cache_keeps_a_jobs_share(tmp_path):
    with pytest.raises(ValueError, match="cache_max_bytes"):
        CacheConfig(cache_max_bytes=2**22 - 1)
    capacity = CacheConfig(cache_max_bytes=2**22).cache_max_bytes
    async with valkey(tmp_path, capacity) as store, cache_on(store, capacity=capacity) as cache:
        keys = cache.keys(A, "", sample_keys(*range(6000)))
        assert await put(cache, A, keys, np.ones((6000, CLASSES), np.float32))
        assert len((await cache.get(keys)).rows) == 6000


@flying
async def test_without_redis_everything_is_a_miss_and_counted():
    class Gone(DictStore):
        async def command(self, *_):
            raise StoreUnavailable("gone")

        script = command

    metrics = Metrics()
    async with cache_on(Gone(), metrics, capacity=10**6) as cache:
        keys = cache.keys(A, "", sample_keys(*range(3)))
        assert await put(cache, A, keys, answers(0, 1, 2))
        assert len((await cache.get(keys)).rows) == 0
        assert counted(metrics, "preceptor_cache_errors_total", kind="unavailable") == 6
        assert cache._unread(A) == 0, "what was not written takes no room"


@flying
async def test_a_redis_that_refuses_is_a_miss_too_and_says_so_once(tmp_path, caplog):
    metrics = Metrics()
    async with valkey(tmp_path) as store, cache_on(store, metrics) as cache:
        keys = cache.keys(A, "", sample_keys(*range(3)))
        for time_round in (1, 2):
            await store.command("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", 1)
            for _ in range(10):
                await put(cache, A, keys, answers(0, 1, 2))
                assert len((await cache.get(keys)).rows) == 0
            assert counted(metrics, "preceptor_cache_errors_total", kind="refused") == 30 * time_round
            assert caplog.text.count("answers cannot be written: command not allowed") == time_round
            await store.command("CONFIG", "SET", "maxmemory", 0)
            await put(cache, A, keys, answers(0, 1, 2))
            await store.command("DEL", *keys)


@flying
async def test_what_waits_to_be_written_is_bounded(monkeypatch):
    monkeypatch.setattr("teacher_server.cache._BACKLOG_BYTES", 1000)
    metrics, store = Metrics(), DictStore()
    store.write_gate.clear()
    async with cache_on(store, metrics) as cache:
        kept = [cache.put(A, cache.keys(A, "", sample_keys(n)), answers(n), lambda: None) for n in range(8)]
        assert kept == [True] * 6 + [False] * 2
        assert counted(metrics, "preceptor_cache_errors_total", kind="dropped") == 2
        store.write_gate.set()
    assert len(store.entries) == 6


# ------------------------------------------------------------ shares


@flying
async def test_a_job_writes_its_share_until_it_reads_or_time_passes():
    clock, metrics = Clock(), Metrics()
    async with cache_on(
        DictStore(), metrics, capacity=40_000, cache_job_share=0.25, cache_ttl_seconds=100, clock=clock
    ) as cache:
        keys = cache.keys(A, "", sample_keys(*range(1000)))
        entry = cache._entry_bytes(keys)
        fits = 10_000 // entry

        async def written():
            before = counted(metrics, "preceptor_cache_declined_total")
            for n in range(1000):
                if not await put(cache, A, keys[n : n + 1], answers(n), overwrite=True):
                    break
            assert counted(metrics, "preceptor_cache_declined_total") == before + 1
            return n

        assert await written() == fits
        assert await put(cache, B, keys[:1], answers(0)), "a job's share is its own"
        cache.used(A, keys, 7)
        assert await written() in {7, 8}
        clock.now += 50
        assert await written() in {fits // 2 - 1, fits // 2, fits // 2 + 1}
        clock.now += 1000
        cache.used(A, keys, 10**6)
        assert await written() == fits, "nothing is saved up"


@flying
async def test_a_stream_of_new_samples_costs_a_job_that_repeats_its_own_nothing(tmp_path):
    """Nothing evicted and every answer found, though the stream is many times the cache."""
    capacity = 8 * 2**20
    async with valkey(tmp_path, capacity) as store, cache_on(store, capacity=capacity) as cache:
        bank = cache.keys(A, "", sample_keys(*range(12_000)))
        entry = cache._entry_bytes(bank)
        assert 0.2 < len(bank) * entry / capacity < 0.25
        await put(cache, A, bank, np.ones((12_000, CLASSES), np.float32))
        ones = np.ones((1000, CLASSES), np.float32)
        for start in range(0, 10 * capacity // entry, 1000):
            stream = cache.keys(B, "", sample_keys(*range(10**6 + start, 10**6 + start + 1000)))
            await cache.get(stream)
            await put(cache, B, stream, ones)
        assert len((await cache.get(bank)).rows) == 12_000
        assert int((await store.info())["evicted_keys"]) == 0


@pytest.mark.parametrize("jobs", [20_000])
@flying
async def test_accounts_are_bounded(jobs):
    async with cache_on(DictStore(), capacity=10**6) as cache:
        keys = cache.keys(A, "", sample_keys(0))
        for n in range(jobs):
            assert cache.put(Caller("t", str(n)), keys, answers(0), lambda: None)
        assert len(cache._accounts) == 10_000
