"""`teacher-server ledger ...`, given as on the command line, on a real Valkey."""

import asyncio
import csv
import io
import json
import os
import re
import subprocess
import sys

import pytest

from protos import teacher_pb2 as pb
from teacher_server.__main__ import main
from teacher_server.accounts import snapshot
from teacher_server.auth import Caller
from teacher_server.budgets import set_budget
from teacher_server.config import LedgerConfig, StoreConfig
from teacher_server.embedded import take_lock
from teacher_server.journal import Journal
from teacher_server.ledger import Ledger
from teacher_server.postings import booked
from teacher_server.script import PLATFORM, run, today
from teacher_server.store import LEDGER_PREFIX, open_stores
from tests.ledgers import TEACHER, compute, crash
from tests.serving import ROOT
from tests.spending import BLUE, FINGERPRINT, PRICE, RED, a_redis, charge, fill, teacher, using


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    with a_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def url(redis_url, monkeypatch):
    """An empty ledger, which the commands are given in the environment."""
    for name in [name for name in os.environ if name.startswith("TEACHER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TEACHER_LEDGER_REDIS_URL", redis_url)
    using(redis_url, lambda store: store.command("FLUSHALL"))
    return redis_url


@pytest.fixture
def ledger(url, capsys):
    """Runs `teacher-server ledger ...`; (status, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()
        status = main(["ledger", *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def full(ledger, url):
    using(url, fill)
    return ledger


def shown(ledger, *arguments):
    status, out, err = ledger(*arguments)
    assert (status, err) == (0, "")
    return out


# ---------------------------------------------------------------- show


def test_show_is_a_table_with_sums(full):
    assert shown(full, "show") == (
        "tenant       job      day         asked  computed  cached  coalesced  GFLOPs  device s       money\n"
        "blue         b        2026-01-31     12         0      12          0       0  0.000000  0.0000 EUR\n"
        "                      2026-02-01     40        40       0          0      80  0.000040  0.0600 EUR\n"
        "red          other    2026-02-01      3         3       0          0       6  0.000003  0.0045 EUR\n"
        "             sweep/a  2026-01-30  1,250     1,000     200         50   2,000  0.001000  1.5000 EUR\n"
        "                      2026-01-31    570       570       0          0   1,140  0.000570  0.9600 EUR\n"
        "--------------------------------------------------------------------------------------------------\n"
        "blue                  all days       52        40      12          0      80  0.000040  0.0600 EUR\n"
        "red                   all days    1,823     1,573     200         50   3,146  0.001573  2.4645 EUR\n"
        "all tenants           all days    1,875     1,613     212         50   3,226  0.001613  2.5245 EUR\n"
        "\n"
        "not charged   samples  GFLOPs  device s\n"
        "own/warm-up        64   128.0  0.000064\n"
        "wasted/crash        7    14.0  0.000000\n"
        "\n"
        "forwarded 1684 = charged 1613 + wasted 7 + own 64\n"
    )


@pytest.mark.parametrize(
    ("filters", "days", "asked"),
    [
        (["--tenant", "red"], {"2026-01-30", "2026-01-31", "2026-02-01"}, 1823),
        (["--tenant", "red", "--job", "other"], {"2026-02-01"}, 3),
        (["--job", "b"], {"2026-01-31", "2026-02-01"}, 52),
        (["--since", "2026-02-01"], {"2026-02-01"}, 43),
        (["--until", "2026-01-30"], {"2026-01-30"}, 1250),
        (["--since", "2026-01-31", "--until", "2026-01-31"], {"2026-01-31"}, 582),
        (["--tenant", "blue", "--until", "2026-01-31"], {"2026-01-31"}, 12),
    ],
)
def test_filters_choose_what_is_shown_and_what_is_exported(full, filters, days, asked):
    text = shown(full, "show", *filters)
    assert {word for word in text.split() if word.startswith("2026-")} == days
    sums = [line for line in text.splitlines() if "all days" in line]
    assert int(sums[-1].split("all days")[1].split()[0].replace(",", "")) == asked
    assert "forwarded" not in text
    rows = list(csv.DictReader(io.StringIO(shown(full, "export", *filters))))
    assert {line["day"] for line in rows} - {"2026-01-30", "2026-02-01"} == days - {"2026-01-30", "2026-02-01"}
    assert sum(int(line["asked"]) for line in rows) == asked


def test_what_is_not_there_is_said(ledger, full):
    assert shown(full, "show", "--tenant", "nobody") == "nothing was spent\n"
    assert shown(full, "show", "--tenant", PLATFORM).startswith("nothing was spent\n\nnot charged ")


def test_an_empty_ledger_is_shown_too(ledger):
    out = shown(ledger, "show")
    assert out == "nothing was spent\n\nforwarded 0 = charged 0 + wasted 0 + own 0\n"
    assert shown(ledger, "show", "--audit") == "nothing was changed\n"
    assert shown(ledger, "verify") == "forwarded 0 = charged 0 + wasted 0 + own 0\n"
    assert shown(ledger, "budget") == "there are no budgets\n"
    assert shown(ledger, "export").count("\n") == 1


def test_two_currencies_are_not_added(ledger, url):
    async def two(store):
        await charge(store, BLUE, 10, "2026-01-31")
        await charge(store, BLUE, 5, "2026-01-31", price=10**9, currency="USD")

    using(url, two)
    assert shown(ledger, "show").count("0.015 EUR + 5.000 USD") == 2


def test_the_audit_says_who_changed_what(full, monkeypatch):
    monkeypatch.setenv("LOGNAME", "ada")
    full("budget", "red", "--samples", "2000")
    full("budget", "red", "sweep/a", "--money", "12.50", "--per", "month")
    full("budget", "red", "sweep/a", "--money", "10", "--per", "month")
    full("budget", "red", "--remove", "samples")
    table = [line.split(maxsplit=3) for line in shown(full, "show", "--audit").splitlines()]
    assert [(who, what) for _, _, who, what in table[1:]] == [
        ("test", f"price of vit ({FINGERPRINT}), a sample: none -> 0.0015 EUR"),
        ("cli:ada", "budget of red, samples in all: none -> 2,000 samples"),
        ("cli:ada", "budget of red sweep/a, money a month: none -> 12.50 EUR"),
        ("cli:ada", "budget of red sweep/a, money a month: 12.50 EUR -> 10.00 EUR"),
        ("cli:ada", "budget of red, samples in all: 2,000 samples -> none"),
    ]
    assert {line[0] for line in table[1:]} == {today()}
    assert len(shown(full, "show", "--audit", "--tenant", "red", "--job", "sweep/a").splitlines()) == 3
    assert shown(full, "show", "--audit", "--until", "2026-01-31") == "nothing was changed\n"


# ---------------------------------------------------------------- export


def test_csv_reads_back_as_the_lines_that_were_written(full, url, tmp_path):
    file = tmp_path / "spend.csv"
    assert shown(full, "export", "--output", file) == ""
    assert file.read_text() == shown(full, "export")
    assert [path.name for path in tmp_path.iterdir()] == ["spend.csv"]
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert list(rows[0]) == [field.name for field in pb.SpendLine.DESCRIPTOR.fields]
    words = {"tenant", "job", "day", "fingerprint", "currency"}
    read = [
        pb.SpendLine(
            **{
                name: text if name in words else float(text) if name == "flops" else int(text)
                for name, text in line.items()
            }
        )
        for line in rows
    ]
    assert read == using(url, lines)
    assert len(read) == 8  # both prices of one day apart
    assert {line.nanos_per_sample for line in read if line.day == "2026-01-31"} == {PRICE, 2 * PRICE}


async def lines(store):
    return (await snapshot(store)).lines()


def test_a_file_that_cannot_be_written_is_an_error(full, tmp_path):
    status, _, err = full("export", "--output", tmp_path / "nowhere" / "spend.csv")
    assert status == 1
    assert "nowhere/spend.csv" in err


# ---------------------------------------------------------------- verify


@pytest.mark.parametrize(
    ("key", "field", "by", "problems"),
    [
        (
            "lines:red:2026-02-01",
            f"other\t{FINGERPRINT}\t{PRICE}\tEUR\tcomputed",
            1,
            [
                "red other 2026-02-01: 4500000 nanos for 4 samples at 1500000",
                "forwarded 1684 samples, but the accounts hold 1685",
                "budget of red (samples, total): 1573 spent in total, but its lines sum to 1574",
            ],
        ),
        (
            "lines:red:2026-02-01",
            f"other\t{FINGERPRINT}\t{PRICE}\tEUR\tdevice_nanoseconds",
            -1,
            ["the device was busy for 1677000 ns, but the accounts hold 1676999 ns"],
        ),
        (
            "lines:_platform:2026-02-01",
            f"gift/x\t{FINGERPRINT}\t0\tEUR\tasked",
            -1,
            [
                "_platform gift/x 2026-02-01: the platform's accounts are own/... and wasted/..., not this one",
                "_platform gift/x 2026-02-01: asked is negative",
            ],
        ),
        (
            "budget:red\t\tsamples\ttotal",
            "held:total",
            5,
            ["budget of red (samples, total): 5 held in total, but leases hold 0"],
        ),
        (
            "budget:red\tsweep/a\tmoney\tmonth",
            "spent:2026-01",
            1,
            ["budget of red sweep/a (money, month): 2460000001 spent in 2026-01, but its lines sum to 2460000000"],
        ),
    ],
)
def test_verify_finds_what_was_tampered_with(full, url, key, field, by, problems):
    full("budget", "red", "--samples", "2000")
    full("budget", "red", "sweep/a", "--money", "12.50", "--per", "month")
    assert shown(full, "verify") == "forwarded 1684 = charged 1613 + wasted 7 + own 64\n"
    using(url, lambda store: store.command("HINCRBY", LEDGER_PREFIX + key, field, by))
    status, out, _ = full("verify")
    assert status == 1
    assert out.splitlines()[1:] == [f"contradiction: {problem}" for problem in problems]
    assert f"{len(problems)} contradictions, see teacher-server ledger verify" in shown(full, "show")


# ---------------------------------------------------------------- backup and restore


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
        part = booked(caller, "2026-02-01", charges=[["", "", samples, 1000, ""]])
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


# ---------------------------------------------------------------- budgets


def budgets(text):
    """{(tenant, job, period, samples or the currency): (limit, spent, left, until)} of a table of budgets."""
    lines = [
        re.split(r"  +", line)
        for line in text.splitlines()
        if " in all " in line or re.search(r" a (day|month) ", line)
    ]
    found = {}
    for tenant, job, limit, spent, left, until in lines:
        number, unit, *period = limit.split()
        numbers = [float(cell.split()[0].replace(",", "")) for cell in (number, spent, left)]
        found[tenant, job, " ".join(period), unit] = (*numbers, until)
    return found


def test_a_budget_counts_what_was_spent_before_it(ledger, url):
    async def spent(store):
        await teacher(store)
        await charge(store, RED, 1000, "2020-01-31")
        await charge(store, RED, 20)
        await charge(store, Caller("red", "other"), 3)

    using(url, spent)
    for owner in (["red"], ["red", "sweep/a"]):
        for per in ("total", "day", "month"):
            shown(ledger, "budget", *owner, "--samples", "5000", "--per", per)
            shown(ledger, "budget", *owner, "--money", "9.5", "--per", per)
    found = budgets(shown(ledger, "budget"))
    assert len(found) == 12
    for (_, job, period, unit), (limit, spent, left, until) in found.items():
        samples = 20 + 3 * (job == "all jobs") + 1000 * (period == "in all")
        assert limit == (5000 if unit == "samples" else 9.5)
        assert spent == pytest.approx(samples if unit == "samples" else samples * 0.0015)
        assert left == pytest.approx(limit - spent)
        assert (until == "for ever") == (period == "in all")
    assert "contradiction" not in shown(ledger, "verify")


def test_a_budget_is_raised_lowered_and_removed(full):
    of_red = ("red", "all jobs", "in all", "samples")
    for limit, word, left in ((2000, "set", 427), (3000, "changed", 1427), (100, "changed", 0)):
        out = shown(full, "budget", "red", "--samples", limit)
        assert out.startswith(f"{word} the budget of tenant red\n\n")
        assert budgets(out) == budgets(shown(full, "budget")) == {of_red: (limit, 1573, left, "for ever")}
    out = shown(full, "budget", "red", "sweep/a", "--samples", "0")
    assert budgets(out) == {("red", "sweep/a", "in all", "samples"): (0, 1570, 0, "for ever")}
    assert len(budgets(shown(full, "budget", "red"))) == 2
    assert shown(full, "budget", "blue") == "there are no budgets\n"
    assert shown(full, "budget", "red", "--remove", "samples").startswith("removed the budget of tenant red\n\n")
    assert of_red not in budgets(shown(full, "budget"))
    for arguments, words in (
        (["red", "--remove", "samples"], "there is no budget of tenant red in samples, per total; without --remove"),
        (
            ["red", "sweep/a", "--remove", "samples", "--per", "day"],
            "there is no budget of job sweep/a of tenant red in samples, per day",
        ),
    ):
        status, _, err = full("budget", *arguments)
        assert status == 1
        assert words in err


@pytest.mark.parametrize(
    ("given", "nanos"),
    [
        ("12.50", 12_500_000_000),
        ("0", 0),
        ("0.000000001", 1),
        ("3", 3_000_000_000),
        ("9007199.254740991", 2**53 - 1),
        ("1e3", 10**12),
    ],
)
def test_money_is_counted_to_its_last_place(full, url, given, nanos):
    shown(full, "budget", "red", "--money", given, "--per", "month")
    key = f"{LEDGER_PREFIX}budget:red\t\tmoney\tmonth"
    assert int(using(url, lambda store: store.command("HGET", key, "limit"))) == nanos


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["red", "--money", "12.5000000001"], 2, "money: Decimal input should have no more than 9 decimal places"),
        (["red", "--money", "12,50"], 2, "money: Input should be a valid decimal, got '12,50' (--money)"),
        (["red", "--money", "nan"], 2, "money: Input should be a finite number"),
        (["red", "--money", "-1"], 2, "money"),
        (["red", "--money", "9007199.254740992"], 1, "outside 0..9007199254740991, of samples or 1e-9 of the currency"),
        (["red", "--samples", "many"], 2, "samples: Input should be a valid integer"),
        (["red", "--samples=-1"], 2, "samples: Input should be greater than or equal to 0, got '-1' (--samples)"),
        (["red", "--samples", "9007199254740992"], 1, "limit: 9007199254740992 is outside"),
        (["red", "--samples", "1", "--money", "1"], 2, "samples and money: give one of them"),
        (["red", "--samples", "1", "--remove", "samples"], 2, "samples and remove: give one of them"),
        (["red", "--samples", "1", "--per", "week"], 2, "per: Input should be 'total', 'day' or 'month', got 'week'"),
        (["--samples", "1"], 2, "samples: whose budget? give TENANT, or TENANT JOB"),
        (["red", "--per", "day"], 2, "per: give --samples, --money or --remove with it"),
        (["_platform", "--samples", "1"], 1, "tenant '_platform': a name is"),
        (["r d", "--samples", "1"], 1, "tenant 'r d': a name is"),
        (["red", "a job", "--samples", "1"], 1, "job 'a job': a name is"),
    ],
)
def test_a_budget_that_is_none_is_refused_and_says_why(full, arguments, status, words):
    given, out, err = full("budget", *arguments)
    assert (given, out) == (status, "")
    assert words in err
    assert shown(full, "budget") == "there are no budgets\n"


# ---------------------------------------------------------------- the command line


def test_the_ledgers_commands_are_listed(ledger):
    status, out, _ = ledger()
    assert status == 2
    assert "usage: teacher-server ledger COMMAND" in out
    assert shown(ledger, "--help") == out
    for command in ("show", "export", "verify", "restore", "budget"):
        assert f"\n  {command} " in out
    status, _, err = ledger("shwo")
    assert status == 2
    assert "unknown command 'ledger shwo'; one of ledger show, ledger export" in err


def test_all_commands_are_listed_and_a_command_alone_is_none(url, capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "\n  serve " in out
    assert "\n  ledger show " in out
    assert main(["show"]) == 2
    assert "unknown command 'show'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "--since", "2026-02-02", "--until", "2026-02-01"], "since: 2026-02-02 is after --until 2026-02-01"),
        (["show", "--since", "yesterday"], "since: Input should be a valid date or datetime"),
        (["export", "--format", "backup", "--tenant", "red"], "format: a backup is of everything"),
        (["export", "--format", "xml"], "format: Input should be 'csv' or 'backup', got 'xml' (--format)"),
    ],
)
def test_arguments_that_make_no_sense_are_named(ledger, arguments, words):
    status, _, err = ledger(*arguments)
    assert status == 2
    assert words in err


@pytest.mark.parametrize("arguments", [["restore"], ["restore", "a", "b"], ["budget", "a", "b", "c"], ["show", "a"]])
def test_too_few_or_too_many_words_are_an_error(ledger, arguments, capsys):
    with pytest.raises(SystemExit) as left:
        ledger(*arguments)
    assert left.value.code == 2


def test_the_servers_own_file_and_variables_do_for_the_ledger(full, url, tmp_path, monkeypatch):
    monkeypatch.delenv("TEACHER_LEDGER_REDIS_URL")
    monkeypatch.setenv("TEACHER_MAX_BATCH_SIZE", "64")
    file = tmp_path / "teacher.toml"
    file.write_text(f'model = "a:b"\nweights = "w"\nledger_redis_url = "{url}"\n')
    assert "forwarded 1684" in shown(full, "verify", "--config", file)
    file.write_text(f'modle = "a:b"\nledger_redis_url = "{url}"\n')
    status, _, err = full("verify", "--config", file)
    assert status == 2
    assert "unknown key" in err
    assert "did you mean model?" in err
    monkeypatch.setenv("TEACHER_LEDGER_REDIS_ULR", url)
    status, _, err = full("verify")
    assert status == 2
    assert "did you mean TEACHER_LEDGER_REDIS_URL?" in err


def test_no_ledger_and_no_redis_are_said_in_one_line(ledger, tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_LEDGER_REDIS_URL", "redis://:secret@127.0.0.1:1")
    status, _, err = ledger("show")
    assert status == 1
    assert "no answer from redis://127.0.0.1:1/0" in err
    assert "secret" not in err
    monkeypatch.delenv("TEACHER_LEDGER_REDIS_URL")
    status, _, err = ledger("show", "--state-directory", tmp_path)
    assert status == 1
    assert f"{tmp_path} holds no ledger" in err
    assert err.count("\n") == 1


def test_no_torch_is_loaded_and_a_reader_may_leave_early(full, url, tmp_path):
    loaded = "import sys; from teacher_server.__main__ import main; main(['ledger', 'verify']); print(*sys.modules)"
    path = os.path.realpath(url.removeprefix("unix://"))
    environment = {**os.environ, "TEACHER_LEDGER_REDIS_URL": f"unix://{path}"}
    done = subprocess.run(
        [sys.executable, "-c", loaded], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("forwarded 1684 ")
    assert not {"torch", "grpc", "fastapi"} & set(done.stdout.split())
    command = f"{sys.executable} -m teacher_server ledger export | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in ended.stderr
    assert "Error" not in ended.stderr


def test_what_is_posted_of_old_days_meanwhile_is_no_contradiction(full, url, monkeypatch):
    """Days that are over are read before the rest; here a replica that had been away posts in between, twice."""
    late = iter([RED, BLUE])

    async def run_late(store, operation, **arguments):
        if operation == "snapshot" and (caller := next(late, None)):
            await charge(store, caller, 1, "2026-01-30")
        return await run(store, operation, **arguments)

    monkeypatch.setattr("teacher_server.accounts.run", run_late)
    assert shown(full, "verify") == "forwarded 1686 = charged 1615 + wasted 7 + own 64\n"
