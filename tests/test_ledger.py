"""What is charged, held and refused; on a real Valkey."""

import asyncio
import random

import pytest

from teacher_server import budgets
from teacher_server.accounts import snapshot
from teacher_server.auth import Caller
from teacher_server.errors import BudgetReserved, BudgetSpent, InvalidQuery
from teacher_server.postings import Charge, Waste
from tests.ledgers import (
    CALLER,
    TEACHER,
    books,
    compute,
    crash,
    eventually,
    held,
    ledger_store,
    replica,
)

DIGEST = b"d" * 16


async def set_budget(store, limit, job=CALLER.job, unit="samples", period="total"):
    await budgets.set_budget(store, CALLER.tenant, job, unit, period, limit=limit, who="test")


def run(test, tmp_path):
    """`test(store, ledger)` with one replica."""

    async def main():
        async with ledger_store(tmp_path) as store:
            async with replica(store, tmp_path) as ledger:
                await test(store, ledger)

    asyncio.run(main())


def test_every_sample_and_nanosecond_of_a_forward_pass_is_booked_once(tmp_path):
    async def test(store, ledger):
        hold = await ledger.hold(CALLER, 10)
        hold.pay(10)
        ledger.book(ledger.forwarding(13), [Charge(CALLER, None, 10, 999, hold)], [Waste("wasted/failed", 3, 301)])
        ledger.answered(CALLER, asked=15, cached=4, coalesced=1)
        await ledger.post()
        assert await books(store) == {CALLER: 10, ("_platform", "wasted/failed"): 3}
        (line,) = [line for line in await lines(store) if line.tenant == CALLER.tenant]
        assert (line.asked, line.computed, line.cached, line.coalesced) == (15, 10, 4, 1)
        assert (line.money_nanos, line.nanos_per_sample, line.currency) == (10_000, 1000, "EUR")
        assert (line.device_nanoseconds, line.flops, line.fingerprint) == (999, 1e7, TEACHER.fingerprint)

    run(test, tmp_path)


async def lines(store):
    return (await snapshot(store)).lines()


@pytest.mark.parametrize(("unit", "limit"), [("samples", 100), ("money", 100_999)])  # 1000 nanos a sample
@pytest.mark.parametrize("job", [CALLER.job, ""])
def test_a_budget_is_spent_to_its_end_and_not_beyond(tmp_path, unit, limit, job):
    async def test(store, ledger):
        await set_budget(store, limit, job, unit)
        await ledger.post()
        await compute(ledger, 60)
        assert [budget.left for budget in ledger.budgets(CALLER)] == [limit - 60 * (1 if unit == "samples" else 1000)]
        with pytest.raises(BudgetSpent, match=r"this query needs (41 samples|0.000041 EUR)"):
            await ledger.hold(CALLER, 41)
        await compute(ledger, 40)
        with pytest.raises(BudgetSpent, match="team"):
            await ledger.hold(CALLER, 1)
        other = Caller(CALLER.tenant, "another")
        if job:
            await compute(ledger, 1, other)
        else:  # the tenant's budget is for all of its jobs
            with pytest.raises(BudgetSpent):
                await ledger.hold(other, 1)
        await ledger.post()
        assert (await books(store))[CALLER] == 100
        await eventually(lambda: nothing_held(store))

    run(test, tmp_path)


async def nothing_held(store):
    return await held(store) == 0


def test_what_others_hold_is_refused_with_a_hint_and_is_there_once_released(tmp_path):
    async def test(store, ledger):
        await set_budget(store, 100)
        await ledger.post()
        hold = await ledger.hold(CALLER, 60)
        with pytest.raises(BudgetReserved) as refused:
            await ledger.hold(CALLER, 41)
        assert refused.value.retry_after > 0
        assert refused.value.reason == "BUDGET_RESERVED"
        hold.release(60)
        (await ledger.hold(CALLER, 41)).release(41)
        with pytest.raises(BudgetSpent):  # more than there is, whoever holds it
            await ledger.hold(CALLER, 101)
        await eventually(lambda: nothing_held(store))

    run(test, tmp_path)


def test_a_query_draws_on_all_its_budgets_and_each_can_refuse_it(tmp_path):
    async def test(store, ledger):
        await set_budget(store, 50, job="", period="month")
        await set_budget(store, 100, period="day")
        await set_budget(store, 100_000_000, unit="money")
        await ledger.post()
        await compute(ledger, 30)
        kinds = {(budget.name, budget.period): budget for budget in ledger.budgets(CALLER)}
        assert {key: budget.left for key, budget in kinds.items()} == {
            ("team", 3): 20,
            ("job", 2): 70,
            ("job", 1): 99_970_000,
        }
        assert not kinds["job", 1].HasField("until")
        assert kinds["team", 3].until.ToDatetime().day == 1
        with pytest.raises(BudgetSpent, match=r"budget of tenant 'team', 50 samples in \d{4}-\d\d \(UTC\)"):
            await ledger.hold(CALLER, 21)

    run(test, tmp_path)


def test_a_budget_set_later_counts_what_was_spent_and_is_noticed_by_those_who_had_none(tmp_path):
    async def test(store, ledger):
        await compute(ledger, 30)
        await ledger.post()
        under_way = await ledger.hold(CALLER, 50)  # nothing had to be reserved for it
        await set_budget(store, 70)

        async def noticed():
            return bool(ledger._purses._owners)

        await eventually(noticed)
        with pytest.raises(BudgetSpent, match="40 samples are left"):
            await ledger.hold(CALLER, 41)
        under_way.pay(50)
        ledger.book(ledger.forwarding(50), [Charge(CALLER, None, 50, 100, under_way)], [])
        await ledger.post()  # 30 + 50 would be more than 70: the rest is the platform's
        assert await books(store) == {CALLER: 70, ("_platform", "wasted/unpaid"): 10}

    run(test, tmp_path)


def test_a_budget_removed_and_set_anew_still_stands_for_what_is_held(tmp_path):
    async def test(store, ledger):
        await set_budget(store, 100)
        await ledger.post()
        under_way = await ledger.hold(CALLER, 40)
        await set_budget(store, None)
        await set_budget(store, 100)
        await ledger.post()
        with pytest.raises(BudgetReserved):
            await ledger.hold(CALLER, 61)
        await compute(ledger, 60)
        under_way.pay(40)
        ledger.book(ledger.forwarding(40), [Charge(CALLER, None, 40, 10, under_way)], [])
        await ledger.post()
        assert await books(store) == {CALLER: 100}
        await eventually(lambda: nothing_held(store))

    run(test, tmp_path)


def test_a_lease_is_not_topped_up_once_another_budget_was_set(tmp_path):
    """The replica does not know of it yet: its version is read with the next posting."""

    async def test(store, ledger):
        await set_budget(store, 1000)
        await ledger.post()
        first = await ledger.hold(CALLER, 40)
        await set_budget(store, 100, job="")
        purse = ledger._purses._purse(CALLER)
        second = await ledger._purses._top_up(purse, 35)
        assert second.lease != first.lease
        for hold in (first, second):
            samples = hold.samples
            hold.pay(samples)
            ledger.book(ledger.forwarding(samples), [Charge(CALLER, None, samples, 10, hold)], [])
        await ledger.post()
        assert await books(store) == {CALLER: 75}
        with pytest.raises(BudgetSpent, match="25 samples are left"):
            await ledger.hold(CALLER, 26)
        await eventually(lambda: nothing_held(store))

    run(test, tmp_path)


def test_a_lease_given_while_its_purse_was_retired_is_renewed_and_given_back(tmp_path):
    async def test(store, ledger):
        await set_budget(store, 1000)
        await ledger.post()
        asked = asyncio.create_task(ledger._purses._top_up(ledger._purses._purse(CALLER), 40))
        await asyncio.sleep(0)  # it has been asked for
        ledger._purses.owners_are({CALLER})  # as when another budget is set
        ledger._purses.beat()
        hold = await asked
        assert hold.lease in [purse.lease for purse in ledger._purses.leases()]
        hold.release(40)
        await ledger.post()
        assert await held(store) == 0

    run(test, tmp_path)


def test_a_request_id_is_charged_once_and_stands_for_one_content(tmp_path):
    async def test(store, ledger):
        for _ in range(5):  # a replay that comes before the first is answered is found when it is posted
            request = await ledger.begin(CALLER, "id", DIGEST)
            assert not request.replayed
            await compute(ledger, 48, request=request)
        ledger.answered(CALLER, asked=48, cached=0, coalesced=0, request=request)
        for _ in range(2):  # before Redis has heard of it, and after
            assert (await ledger.begin(CALLER, "id", DIGEST)).replayed
            with pytest.raises(InvalidQuery, match="for other samples"):
                await ledger.begin(CALLER, "id", b"other")
            await ledger.post()
        assert not ledger._finished
        assert not (await ledger.begin(Caller("team", "other"), "id", b"other")).replayed
        with pytest.raises(InvalidQuery, match="request_id: 'id' was used by job 'job' for other samples"):
            await ledger.begin(CALLER, "id", b"other")
        with pytest.raises(InvalidQuery, match="257 bytes"):
            await ledger.begin(CALLER, "x" * 257, DIGEST)
        assert await books(store) == {CALLER: 48, ("_platform", "wasted/replay"): 4 * 48}

    run(test, tmp_path)


def test_a_second_attempt_pays_for_what_the_first_did_not_reach(tmp_path):
    """A query of two batches, cancelled after the first: nobody gets the second one for nothing."""

    async def test(store, ledger):
        first = await ledger.begin(CALLER, "id", DIGEST)
        await compute(ledger, 64, request=first)
        second = await ledger.begin(CALLER, "id", DIGEST)
        assert not second.replayed
        await compute(ledger, 64, request=second)
        await compute(ledger, 36, request=second, first=64)
        await ledger.post()
        assert await books(store) == {CALLER: 100, ("_platform", "wasted/replay"): 64}
        third = await ledger.begin(CALLER, "cached", DIGEST)
        await compute(ledger, 10, request=third, first=3)
        await ledger.post()
        fourth = await ledger.begin(CALLER, "cached", DIGEST)  # it finds those, and more, in the cache
        await compute(ledger, 5, request=fourth, first=40)
        await compute(ledger, 5, request=fourth, first=45)
        await compute(ledger, 5, request=fourth, first=0)  # of which two were paid for
        await ledger.post()
        assert await books(store) == {CALLER: 100 + 10 + 10 + 3, ("_platform", "wasted/replay"): 64 + 2}

    run(test, tmp_path)


def test_a_replica_that_crashed_leaves_nothing_reserved_and_nothing_unaccounted(tmp_path):
    async def main():
        async with ledger_store(tmp_path) as store:
            await set_budget(store, 1000)
            doomed = replica(store, tmp_path)
            await doomed.__aenter__()
            await compute(doomed, 100)
            await doomed.post()
            await compute(doomed, 20)  # in its journal only
            doomed.forwarding(64)  # a pass that it did not survive
            await doomed.hold(CALLER, 300)
            await crash(doomed)
            assert await held(store) >= 300
            for _ in range(2):  # the second finds nothing left to do
                async with replica(store, tmp_path) as ledger:
                    await ledger.post()
                    expected = {CALLER: 120, ("_platform", "wasted/crash"): 64}
                    assert await books(store) == expected
            async with replica(store, tmp_path, "another") as ledger:  # its calls find the lease lapsed
                await eventually(lambda: nothing_held(store))
                await compute(ledger, 880)
                with pytest.raises(BudgetSpent):
                    await ledger.hold(CALLER, 1)

    asyncio.run(main())


def test_a_charge_whose_lease_has_lapsed_is_made_only_if_there_is_room(tmp_path):
    async def main():
        async with ledger_store(tmp_path) as store:
            await set_budget(store, 100)
            async with replica(store, tmp_path, "late") as late, replica(store, tmp_path, "quick") as quick:
                holds = [await late.hold(CALLER, 30), await late.hold(CALLER, 40)]
                for task in late._tasks:  # it hangs, and renews nothing
                    task.cancel()
                await eventually(lambda: nothing_held(store))
                await compute(quick, 60)
                await quick.post()
                for hold in holds:
                    samples = hold.samples
                    hold.pay(samples)
                    late.book(late.forwarding(samples), [Charge(CALLER, None, samples, 10, hold)], [])
                await late.post()
                assert await books(store) == {CALLER: 100, ("_platform", "wasted/unpaid"): 30}

    asyncio.run(main())


def test_replicas_race_for_a_budget_and_none_is_overspent(tmp_path):
    """Many callers at three replicas, of which one crashes; in the end less is left than the smallest query refused."""

    async def main(seed):
        draw = random.Random(seed)
        limit = draw.randrange(500, 3000)
        refused = []

        async def caller(ledger, sizes):
            for samples in sizes:
                while True:
                    try:
                        hold = await ledger.hold(CALLER, samples)
                    except BudgetReserved:
                        await asyncio.sleep(0.01)
                        continue
                    except BudgetSpent:
                        refused.append(samples)
                        break
                    await asyncio.sleep(draw.random() / 100)
                    if draw.random() < 0.1:
                        hold.release(samples)
                    else:
                        hold.pay(samples)
                        ledger.book(ledger.forwarding(samples), [Charge(CALLER, None, samples, 10, hold)], [])
                    break

        def sizes():
            return [draw.randrange(1, 49) for _ in range(12)]

        async with ledger_store(tmp_path / str(seed)) as store:
            await set_budget(store, limit)
            doomed = replica(store, tmp_path / str(seed), "doomed")
            await doomed.__aenter__()
            async with (
                replica(store, tmp_path / str(seed), "a") as a,
                replica(store, tmp_path / str(seed), "b") as b,
                asyncio.TaskGroup() as group,
            ):
                lost = [group.create_task(caller(doomed, sizes())) for _ in range(5)]
                for ledger in (a, b) * 8:
                    group.create_task(caller(ledger, sizes()))
                await asyncio.sleep(0.05)
                for task in lost:
                    task.cancel()
                await crash(doomed)
            async with replica(store, tmp_path / str(seed), "doomed") as ledger:
                await ledger.post()
                await eventually(lambda: nothing_held(store))
            charged = (await books(store))[CALLER]
            assert charged <= limit
            assert refused, "the budget was to be spent"
            assert limit - charged < min(refused)

    for seed in range(4):
        asyncio.run(main(seed))


def test_an_idle_purse_gives_back_what_it_keeps_in_reserve(tmp_path):
    async def test(store, ledger):
        await set_budget(store, 10_000)
        await ledger.post()
        trips = 0
        for _ in range(50):
            if (hold := ledger.hold_now(CALLER, 10)) is None:
                trips += 1
            else:
                hold.release(10)
            await compute(ledger, 10)
        assert trips < 25, "a busy job pays from its purse"
        assert await held(store) > 0
        await eventually(lambda: nothing_held(store))
        assert (await books(store))[CALLER] == 500

    run(test, tmp_path)


def test_a_new_day_is_another_budget(tmp_path, monkeypatch):
    async def test(store, ledger):
        monkeypatch.setattr("teacher_server.purses.today", lambda: "2030-01-31")
        await budgets.set_budget(store, "team", "job", "samples", "day", limit=100, who="test")
        await budgets.set_budget(store, "team", "", "samples", "month", limit=150, who="test")
        await ledger.post()
        await compute(ledger, 90)
        across = await ledger.hold(CALLER, 10)
        with pytest.raises(BudgetSpent, match=r"2030-01-31 .* until it begins anew on 2030-02-01"):
            await ledger.hold(CALLER, 11)
        (left,) = [state["limit"] - state["spent"] for state in ledger.states() if state["period"] == "day"]
        assert left == 10
        monkeypatch.setattr("teacher_server.purses.today", lambda: "2030-02-01")
        assert ledger.states() == ledger.budgets(CALLER) == []  # what was left of days and months that are over
        await compute(ledger, 100)
        across.pay(10)  # reserved on the day before, and charged to it
        ledger.book(ledger.forwarding(10), [Charge(CALLER, None, 10, 10, across)], [])
        await ledger.post()
        days = {line.day: line.computed for line in await lines(store)}
        assert days == {"2030-01-31": 100, "2030-02-01": 100}
        await books(store)

    run(test, tmp_path)
