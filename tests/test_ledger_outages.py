"""Redis goes, hangs, comes back without its last second; the journal's disk is full. The books stay whole."""

import asyncio
import os
import shutil
import signal
import time
from contextlib import contextmanager, suppress

import pytest

from teacher_server import budgets, journal
from teacher_server.auth import Caller
from teacher_server.embedded import embedded
from teacher_server.errors import BudgetSpent, LedgerUnavailable
from teacher_server.journal import Journal, LeftBehind, left_behind
from teacher_server.postings import Entry, Waste, booked
from teacher_server.store import LEDGER_PREFIX, Store, StoreUnavailable
from tests.ledgers import (
    CALLER,
    TEACHER,
    books,
    compute,
    crash,
    eventually,
    held,
    ledger_store,
    pid_of,
    posted,
    replica,
    stopped,
    waste,
    without_answer,
)

FREE = Caller("free", "job")  # a tenant without a budget


def test_while_redis_hangs_budgets_are_paid_from_the_purse_and_others_go_on(tmp_path):
    async def main():
        async with ledger_store(tmp_path) as store:
            await budgets.set_budget(store, "team", "job", "samples", "total", limit=1000, who="test")
            async with replica(store, tmp_path, lease_seconds=6) as ledger:
                await compute(ledger, 100)
                await compute(ledger, 1)  # topped up by about as much as was paid
                assert ledger.hold_now(CALLER, 50).release(50) is None
                with stopped(await pid_of(store)):
                    await without_answer(store)
                    await compute(ledger, 50)
                    with pytest.raises(LedgerUnavailable, match="job 'job' of tenant 'team' cannot be drawn on"):
                        await ledger.hold(CALLER, 500)
                    for _ in range(20):
                        await compute(ledger, 48, FREE)
                    request = await ledger.begin(FREE, "id", b"d" * 16)
                    await compute(ledger, 48, FREE, request)

                await eventually(lambda: posted(ledger))
                assert await books(store) == {CALLER: 151, FREE: 21 * 48}
                await compute(ledger, 500)
            assert (await books(store))[CALLER] == 651

    asyncio.run(main())


def test_after_a_long_outage_each_posting_costs_what_it_costs_after_a_short_one(tmp_path):
    async def cost(ledger, store, postings):
        """Seconds of this process for each of so many that have to be made up for."""
        with stopped(await pid_of(store)):
            await without_answer(store)
            for _ in range(postings):
                await compute(ledger, 1, FREE)
                with pytest.raises(StoreUnavailable):
                    await ledger.post()

        async def again():
            return store.available

        await eventually(again)
        began = time.process_time()
        await ledger.post()
        return (time.process_time() - began) / postings

    async def main():
        async with ledger_store(tmp_path) as store, replica(store, tmp_path) as ledger:
            await crash(ledger)  # posts only as told
            short = await cost(ledger, store, 200)
            assert await cost(ledger, store, 4000) < 4 * short
            assert await books(store) == {FREE: 4200}

    asyncio.run(main())


def test_a_killed_redis_loses_nothing_that_was_charged(tmp_path):
    async def main():
        async with ledger_store(tmp_path) as store, replica(store, tmp_path) as ledger:
            await budgets.set_budget(store, "team", "job", "samples", "total", limit=10_000, who="test")
            charged = 0
            for _ in range(3):
                for _ in range(10):
                    await compute(ledger, 7, FREE)
                    charged += 7
                await ledger.post()
                os.kill(await pid_of(store), signal.SIGKILL)
                await compute(ledger, 5, FREE)
                charged += 5

                await eventually(lambda: posted(ledger))
            waste(ledger, 3)
            await ledger.post()
            assert await books(store) == {FREE: charged, ("_platform", "wasted/failed"): 3}

    asyncio.run(main())


def test_postings_that_redis_lost_in_a_crash_are_repeated(tmp_path):
    """Its append-only file is put back to an earlier moment, as a crash before an fsync would leave it."""

    async def main():
        directory = tmp_path / "valkey"
        async with embedded(directory, "ledger", persistent=True, max_bytes=None) as url, Store(url, "ledger") as store:
            await budgets.set_budget(store, "team", "job", "samples", "total", limit=100, who="test")
            async with replica(store, tmp_path) as ledger:
                await compute(ledger, 10)
                await ledger.post()
                pid = await pid_of(store)
                with stopped(pid):  # nothing is written while it is copied
                    shutil.copytree(directory / "appendonlydir", tmp_path / "earlier")
                await eventually(lambda: computed(ledger, 20))
                await ledger.post()
                await compute(ledger, 30)
                await ledger.post()
                assert await books(store) == {CALLER: 60}
                os.kill(pid, signal.SIGSTOP)  # it may not rewrite the file, nor be started again, before it is replaced
                shutil.rmtree(directory / "appendonlydir")
                shutil.copytree(tmp_path / "earlier", directory / "appendonlydir")
                os.kill(pid, signal.SIGKILL)

                async def repeated():
                    return store.available and (await store.info())["process_id"] != str(pid)

                await eventually(repeated)
                await eventually(lambda: post(ledger))
                assert await books(store) == {CALLER: 60}
                await compute(ledger, 40)
                with pytest.raises(BudgetSpent):
                    await ledger.hold(CALLER, 1)

    async def post(ledger):
        await ledger.post()
        return True

    async def computed(ledger, samples):
        try:
            await compute(ledger, samples)
        except LedgerUnavailable:
            return False
        return True

    asyncio.run(main())


def test_postings_that_redis_lost_are_repeated_before_one_that_is_due(tmp_path):
    async def main():
        async with ledger_store(tmp_path) as store, replica(store, tmp_path) as ledger:
            await crash(ledger)  # posts and forgets only as told
            for samples in (10, 20):
                await compute(ledger, samples, FREE)
                await ledger.post()
            await store.command("FLUSHALL")
            await compute(ledger, 5, FREE)
            await ledger.post()
            assert await books(store) == {FREE: 35}

    asyncio.run(main())


def test_a_loss_that_cannot_be_made_up_for_is_in_the_audit_once(tmp_path, caplog):
    async def main():
        async with ledger_store(tmp_path) as store, replica(store, tmp_path) as ledger:
            await crash(ledger)
            await compute(ledger, 10, FREE)
            await ledger.post()
            ledger._forget(1, [])  # as if it had been on Redis's disk
            await store.command("FLUSHALL")
            for _ in range(3):
                await ledger.post()
            await compute(ledger, 5, FREE)
            await ledger.post()
            assert [change.what for change in await budgets.audit(store)] == ["postings lost by Redis"]
            assert await books(store) == {FREE: 5}

    asyncio.run(main())
    assert caplog.text.count("postings 1 to 1 are lost: the ledger was put back to an older state") == 1


def test_of_a_redis_that_was_put_back_everything_is_learnt_anew(tmp_path):
    """It has budgets that were gone, after as many changes as the replica knows of, and no teacher."""

    async def main():
        directory = tmp_path / "valkey"
        async with embedded(directory, "ledger", persistent=True, max_bytes=None) as url, Store(url, "ledger") as store:
            job = (store, *CALLER, "samples", "total")
            for limit in (50, 100):
                await budgets.set_budget(*job, limit=limit, who="test")
            pid = await pid_of(store)
            with stopped(pid):
                shutil.copytree(directory / "appendonlydir", tmp_path / "earlier")
            await eventually(lambda: flushed(store))
            for limit in (50, None):
                await budgets.set_budget(*job, limit=limit, who="test")
            async with replica(store, tmp_path) as ledger:
                await compute(ledger, 200)
                os.kill(pid, signal.SIGSTOP)
                shutil.rmtree(directory / "appendonlydir")
                shutil.move(tmp_path / "earlier", directory / "appendonlydir")
                os.kill(pid, signal.SIGKILL)
                await eventually(lambda: bounded(ledger))
                teacher = await store.command("HGET", f"{LEDGER_PREFIX}teacher:{TEACHER.fingerprint}", "flops")
                assert float(teacher) == TEACHER.flops_per_sample

    async def flushed(store):
        return await store.command("FLUSHALL")

    async def bounded(ledger):
        with suppress(LedgerUnavailable):
            await ledger.post()
            try:
                (await ledger.hold(CALLER, 101)).release(101)
            except BudgetSpent:
                return True
        return False

    asyncio.run(main())


def test_no_loss_is_told_where_postings_go_on_while_one_asks_what_redis_has(tmp_path, caplog):
    async def main():
        async with ledger_store(tmp_path) as store, replica(store, tmp_path) as ledger:
            ledger._left = [LeftBehind("another", {}, {1: []}, 0, [])] * 20  # it asks about each of them
            while not ledger._forgotten:
                await compute(ledger, 1, FREE)
                await ledger.post()

    asyncio.run(main())
    assert "Redis has lost" not in caplog.text


def test_a_file_that_cannot_be_removed_keeps_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_SEGMENT_BYTES", 100)

    async def main():
        async with ledger_store(tmp_path) as store, replica(store, tmp_path) as ledger:

            async def forgotten():
                return ledger._forgotten == ledger._number

            for _ in range(3):
                await compute(ledger, 1, FREE)
                await ledger.post()
            first = ledger._journal._old[0][0]
            first.unlink()
            first.mkdir()
            await eventually(forgotten)
            await compute(ledger, 1, FREE)
            await ledger.post()
            await eventually(forgotten)
            assert not ledger._journal._old
            first.rmdir()

    asyncio.run(main())


def test_both_crash_and_the_journal_has_it(tmp_path):
    async def main():
        async with ledger_store(tmp_path) as store:
            ledger = replica(store, tmp_path)
            await ledger.__aenter__()
            await compute(ledger, 10, FREE)
            await ledger.post()
            os.kill(await pid_of(store), signal.SIGKILL)
            await compute(ledger, 20, FREE)
            ledger.forwarding(5)
            await crash(ledger)
        async with ledger_store(tmp_path) as store:
            async with replica(store, tmp_path) as ledger:
                assert await books(store) == {FREE: 30, ("_platform", "wasted/crash"): 5}

                async def forgotten():
                    return not ledger._left

                await eventually(forgotten)
            assert len(list((tmp_path / "replica").iterdir())) == 1  # its own
            assert await held(store) == 0

    asyncio.run(main())


def test_a_journal_forgets_only_what_redis_has_on_its_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_SEGMENT_BYTES", 2000)

    async def main():
        async with ledger_store(tmp_path) as store, replica(store, tmp_path) as ledger:

            def files():
                return sorted(path.name[-6:] for path in (tmp_path / "replica").iterdir())

            under_way = ledger.forwarding(7)
            with stopped(await pid_of(store)):
                await without_answer(store)
                samples = 0
                while len(files()) < 3:
                    await compute(ledger, 7, FREE)
                    samples += 7
                    await asyncio.sleep(0.01)
                assert files()[0] == "000000", "none of it is on Redis's disk"

            async def rotated():
                return files()[0] != "000000"

            await eventually(rotated)
            left = list(left_behind(tmp_path / "replica"))
            assert [entry.wasted for entry in left] == [7], "a pass under way is carried over"
            ledger.book(under_way, [], [])
            await eventually(lambda: posted(ledger))
            assert await books(store) == {FREE: samples}

    asyncio.run(main())


def test_a_torn_line_is_not_read_and_harms_no_other(tmp_path):
    log = Journal(tmp_path, "epoch", {"fingerprint": "f", "price": 0, "currency": "EUR"})
    log.record({"lines": [], "totals": [1, 1]}, log.forwarding(4))
    first = log.forwarding(5)
    log.posted(1)
    log.record({"lines": [], "totals": [2, 2]}, first)
    log.forwarding(6)
    log.close()
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for cut in range(len(content.splitlines(keepends=True)[-1])):
        path.write_bytes(content[: len(content) - cut])
        (left,) = left_behind(tmp_path)
        assert left.wasted == (0 if cut > 1 else 6)  # one byte: the end of the line alone
        assert left.postings == {1: [{"lines": [], "totals": [1, 1]}], 2: [{"lines": [], "totals": [2, 2]}]}
    path.write_bytes(b"")
    assert list(left_behind(tmp_path)) == []


def test_where_the_line_of_a_posting_is_not_readable_the_next_one_has_it_all(tmp_path):
    log = Journal(tmp_path / "replica", "epoch", {"fingerprint": "f", "price": 0, "currency": "EUR"})
    for posting in range(1, 4):
        part = Entry("", posting, 0, "", "")
        log.record({"lines": [booked(FREE, "2026-01-31T12", charges=[part])], "totals": [posting, 0]})
        log.posted(posting)
    log.close()
    (path,) = (tmp_path / "replica").iterdir()
    path.write_bytes(path.read_bytes().replace(b'{"posting":2}', b'{"posting":0}'))

    async def main():
        async with ledger_store(tmp_path) as store, replica(store, tmp_path):
            assert await books(store) == {FREE: 6}

    asyncio.run(main())


def test_what_cannot_be_journalled_is_not_computed(tmp_path):
    log = Journal(tmp_path, "epoch", {})
    os.close(log._file)
    log._file = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(LedgerUnavailable, match=r"journal cannot be written .* No space left"):
        log.forwarding(3)
    log.close()


@contextmanager
def full_disk(log):
    file, log._file = log._file, os.open("/dev/full", os.O_WRONLY)
    try:
        yield
    finally:
        os.close(log._file)
        log._file = file


def test_an_outcome_that_the_disk_did_not_take_is_written_before_what_follows(tmp_path):
    async def main():
        async with ledger_store(tmp_path) as store:
            ledger = replica(store, tmp_path)
            await ledger.__aenter__()
            number = ledger.forwarding(7)
            with full_disk(ledger._journal):
                ledger.book(number, [], [Waste("wasted/failed", 7, 10)])
                with pytest.raises(LedgerUnavailable):
                    await ledger.post()
            await ledger.post()
            await crash(ledger)
            async with replica(store, tmp_path):
                assert await books(store) == {("_platform", "wasted/failed"): 7}

    asyncio.run(main())


def test_where_no_new_file_can_be_begun_the_old_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_SEGMENT_BYTES", 100)
    log = Journal(tmp_path, "epoch", {"fingerprint": "f", "price": 0, "currency": "EUR"})
    records = [{"lines": [], "totals": [samples, 0]} for samples in range(3)]
    (tmp_path / "epoch.000001").mkdir()  # in its way
    for posting in (1, 2):
        log.record(records[posting - 1], log.forwarding(4))
        log.posted(posting)
    (tmp_path / "epoch.000001").rmdir()
    under_way = log.forwarding(9)
    log.posted(3)
    log.record(records[2])
    log.close()
    (left,) = left_behind(tmp_path)
    assert left.wasted == 9
    assert left.postings == {1: records[:1], 2: records[1:2], 3: [], 4: records[2:]}
    assert [path.name for path in left.paths] == ["epoch.000000", "epoch.000001"]
    log.forget(3)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch.000001"]
    assert under_way == 3


def test_a_journal_that_cannot_be_begun_says_where(tmp_path):
    (tmp_path / "epoch.000000").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"state_directory: .* in {tmp_path} \(No space left on device\); make room"):
        Journal(tmp_path, "epoch", {})
    assert list(tmp_path.iterdir()) == []


def test_a_line_of_which_only_the_end_is_missing_does_not_count_once_it_was_refused(tmp_path):
    log = Journal(tmp_path, "epoch", {})
    log.forwarding(4)
    (path,) = tmp_path.iterdir()
    os.truncate(path, path.stat().st_size - 1)
    log._torn = True
    log.forwarding(5)
    log.close()
    (left,) = left_behind(tmp_path)
    assert left.wasted == 5
