"""`teacher-server ledger restore`: backups, and what a lost replica left behind."""

import asyncio
import json
import os

import pytest

from teacher_server.accounts import snapshot
from teacher_server.auth import Caller
from teacher_server.budgets import set_budget
from teacher_server.config import LedgerConfig, StoreConfig
from teacher_server.embedded import take_lock
from teacher_server.journal import Journal
from teacher_server.ledger import Ledger
from teacher_server.postings import Entry, booked
from teacher_server.script import PLATFORM, run, today
from teacher_server.store import open_stores
from teacher_server.usage import usage
from tests.ledgers import TEACHER, compute, crash
from tests.spending import FINGERPRINT, PRICE, RED, charge, shown, using


def test_a_backup_restored_into_a_fresh_ledger_says_the_same(full, url, tmp_path, monkeypatch):
    file, state = tmp_path / "backup.json", tmp_path / "state"
    full("budget", "red", "--samples", "2000")
    full("budget", "red", "sweep/a", "--money", "12.50", "--per", "month")
    shown(full, "export", "--format", "backup", "--output", file)
    before = [shown(full, command) for command in ("show", "verify", "export", "budget")]
    audit = shown(full, "show", "--audit").splitlines()
    monkeypatch.delenv("TEACHER_LEDGER_REDIS_URL")
    monkeypatch.setenv("TEACHER_STATE_DIRECTORY", str(state))  # an embedded ledger that is not there yet
    restored = shown(full, "restore", file)
    assert restored.startswith(f"restored the ledger of {today()}")
    assert restored.splitlines()[1:] == before[1].splitlines()
    assert [shown(full, command) for command in ("show", "verify", "export", "budget")] == before
    lines_now = [line.split() for line in shown(full, "show", "--audit").splitlines()]  # a wider name, more blanks
    assert lines_now[1:-1] == [line.split() for line in audit[1:]]
    assert lines_now[-1][-1] == "restored"
    status, _, err = full("restore", file)
    assert status == 1
    assert "the ledger is not empty: restore into a new one" in err


def test_what_was_held_at_the_moment_of_the_backup_is_not_held_after_it(ledger, url, tmp_path):
    file = tmp_path / "backup.json"

    async def hold(store):
        await set_budget(store, "team", "", "samples", "day", limit=100, who="test")
        replica = Ledger(store, LedgerConfig(), tmp_path / "journal", TEACHER, who="test")
        async with replica:
            await replica.hold(Caller("team", "job"), 30)
            backup = await snapshot(store, everything=True)
            await crash(replica)
        return backup

    backup = using(url, hold)
    header = {"format": "preceptor ledger", "version": 1, "time": "2026-01-31T00:00:00Z"}
    file.write_text(json.dumps(header | {"keys": backup.keys}))
    using(url, lambda store: store.command("FLUSHALL"))
    assert "restored the ledger of 2026-01-31 00:00:00 UTC" in shown(ledger, "restore", file)
    assert "  100 samples a day  0 samples  100 samples  " in shown(ledger, "budget")
    assert "held" not in shown(ledger, "budget")
    assert "contradiction" not in shown(ledger, "verify")


@pytest.mark.parametrize("used_meanwhile", [False, True])
def test_a_backup_of_years_goes_back_in_parts_and_takes_effect_at_once(
    full, url, tmp_path, monkeypatch, used_meanwhile
):
    """In one piece it would keep Redis from answering for longer than one waits for it."""
    file, parts = tmp_path / "backup.json", []
    shown(full, "export", "--format", "backup", "--output", file)
    before = shown(full, "export")
    using(url, lambda store: store.command("FLUSHALL"))

    async def watched(store, operation, **arguments):
        if operation == "stage":
            assert (await snapshot(store)).lines() == []
            parts.append(sum(len(values) for _, _, values, _ in arguments["keys"]))
        if operation == "restore" and used_meanwhile:
            await charge(store, RED, 1, "2026-01-30")
        return await run(store, operation, **arguments)

    monkeypatch.setattr("teacher_server.accounts.run", watched)
    monkeypatch.setattr("teacher_server.accounts._VALUES_AT_ONCE", 10)
    status, _, err = full("restore", file)
    assert len(parts) > 2
    if used_meanwhile:
        assert "the ledger is not empty" in err
        assert shown(full, "verify") == "forwarded 1 = charged 1 + wasted 0 + own 0\n"
    else:
        assert status == 0
        assert shown(full, "export") == before
    assert using(url, lambda store: store.command("KEYS", "*restoring*")) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "tenant,job\n", "is no backup of a ledger (the file: Invalid JSON"),
        (lambda text: text[: len(text) // 2], "is no backup of a ledger (the file: Invalid JSON"),
        (
            lambda text: '{"keys": []}',
            "is no backup of a ledger (format: Field required); make one with teacher-server",
        ),
        (lambda text: text.replace('"version": 1', '"version": 2'), "is of version 2, and this program reads 1"),
        (lambda text: text.replace('["days:red", "set"', '["days:red", "bag"'), "keys"),
        (lambda text: text.replace("\\tcomputed", "computed"), "is damaged"),
        (lambda text: text.replace('"flops", ', ""), "is damaged"),
    ],
)
def test_what_is_no_backup_is_not_restored(full, url, tmp_path, change, words):
    file = tmp_path / "backup.json"
    text = shown(full, "export", "--format", "backup")
    file.write_text(change(text))
    using(url, lambda store: store.command("FLUSHALL"))
    status, _, err = full("restore", file)
    assert status == 1
    assert words in err
    assert using(url, lambda store: store.command("DBSIZE")) <= 1  # nothing but what on_disk writes


def test_restore_says_what_is_not_there(ledger, tmp_path):
    for path, words in ((tmp_path / "nowhere", "No such file"), (tmp_path, "there is no journal in it")):
        status, _, err = ledger("restore", path)
        assert status == 1
        assert words in err


def left_behind(directory, postings=True):
    """The state directory of a replica that was killed: 5 and 6 charged, 3 wasted, 2 of its own, 8 under way."""
    header = {"fingerprint": FINGERPRINT, "price": PRICE, "currency": "EUR"}
    journal = Journal(directory / "journal", "gone-1", header)

    def done(caller, samples):
        part = booked(caller, "2026-02-01T12", charges=[Entry("", samples, 1000, "", "")])
        journal.record({"lines": [part], "totals": [samples, 1000]}, journal.forwarding(samples))

    done(RED, 5)
    done(Caller(PLATFORM, "own/warm-up"), 2)
    if postings:
        journal.posted(1)
    done(RED, 6)
    done(Caller(PLATFORM, "wasted/failed"), 3)
    journal.forwarding(8)
    journal.close()


def test_what_a_dead_replica_left_behind_is_settled_once(ledger, url, tmp_path):
    left_behind(tmp_path)
    copy = tmp_path / "copy"
    (copy / "journal").mkdir(parents=True)
    (file,) = (tmp_path / "journal").iterdir()
    (copy / "journal" / file.name).write_bytes(file.read_bytes())
    out = shown(ledger, "restore", tmp_path)
    assert out == "gone-1: samples: 2 of own/warm-up, 11 of red sweep/a, 8 of wasted/crash, 3 of wasted/failed\n"
    assert list((tmp_path / "journal").iterdir()) == []
    books = "forwarded 24 = charged 11 + wasted 11 + own 2\n"
    assert shown(ledger, "verify") == books
    assert shown(ledger, "restore", tmp_path) == f"nothing is left behind in {tmp_path}\n"
    assert shown(ledger, "restore", copy) == "gone-1: all of it was known already\n"
    assert shown(ledger, "verify") == books


def test_what_a_replica_of_before_there_were_hours_left_behind_is_settled_too(ledger, url, tmp_path):
    """Killed, and started anew as the next version: its records have a day."""
    header = {"fingerprint": FINGERPRINT, "price": PRICE, "currency": "EUR"}
    journal = Journal(tmp_path / "journal", "gone-1", header)
    part = booked(RED, today(), charges=[Entry("", 5, 1000, "", "")], asked=7, cached=2)
    part["day"] = part.pop("hour")
    del part["unasked"]
    journal.record({"lines": [part], "totals": [5, 1000]}, journal.forwarding(5))
    journal.close()
    assert shown(ledger, "restore", tmp_path) == "gone-1: samples: 5 of red sweep/a\n"
    assert shown(ledger, "verify") == "forwarded 5 = charged 5 + wasted 0 + own 0\n"
    ((place, row),) = using(url, lambda store: usage(store, "hour", 24)).rows.items()
    assert (place[0], row["asked"], row["candidates"]) == (f"{today()}T00", 7, 7)


def test_the_journal_of_a_server_that_runs_is_left_to_it(ledger, tmp_path):
    left_behind(tmp_path)
    lock = take_lock(tmp_path / "lock")
    try:
        status, _, err = ledger("restore", tmp_path)
    finally:
        os.close(lock)
    assert status == 1
    assert "a server runs there, and settles its journal itself" in err
    assert "forwarded 0" in shown(ledger, "verify")
    assert shown(ledger, "restore", tmp_path).startswith("gone-1: samples")


def test_a_journal_stays_until_redis_has_it_on_its_disk(ledger, url, tmp_path, monkeypatch):
    monkeypatch.setattr("teacher_server.ledger_commands._ON_DISK_SECONDS", 0.0)
    left_behind(tmp_path)
    status, out, err = ledger("restore", tmp_path)
    assert status == 1
    assert "has not said that it is on its disk, so the journal stays" in err
    assert out.startswith("gone-1: samples")
    monkeypatch.undo()
    monkeypatch.setenv("TEACHER_LEDGER_REDIS_URL", url)
    assert shown(ledger, "restore", tmp_path) == "gone-1: all of it was known already\n"
    assert list((tmp_path / "journal").iterdir()) == []


def test_with_a_ledger_of_its_own_a_replicas_directory_is_both(ledger, tmp_path, monkeypatch):
    """No Redis URL: the embedded ledger lies beside the journal."""
    monkeypatch.delenv("TEACHER_LEDGER_REDIS_URL")
    monkeypatch.setenv("TEACHER_STATE_DIRECTORY", str(tmp_path))

    async def serve():
        async with open_stores(StoreConfig(state_directory=tmp_path), 2**20) as stores:
            replica = Ledger(stores.ledger, LedgerConfig(), tmp_path / "journal", TEACHER, who="test")
            async with replica:
                await compute(replica, 10)
                await replica.post()
                await compute(replica, 4)
                await crash(replica)
                replica._pending.clear()

    asyncio.run(serve())
    assert "charged 10 " in shown(ledger, "verify")
    assert "4 of team job" in shown(ledger, "restore", tmp_path)
    assert shown(ledger, "verify") == "forwarded 14 = charged 14 + wasted 0 + own 0\n"
    assert list((tmp_path / "journal").iterdir()) == []
