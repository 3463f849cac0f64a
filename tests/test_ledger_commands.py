"""`teacher-server ledger show, export, verify` and the command line, on a real Valkey."""

import csv
import io
import os
import subprocess
import sys

import pytest

from protos import teacher_pb2 as pb
from teacher_server.__main__ import main
from teacher_server.accounts import snapshot
from teacher_server.script import PLATFORM, run, today
from teacher_server.store import LEDGER_PREFIX
from tests.serving import ROOT
from tests.spending import BLUE, FINGERPRINT, PRICE, RED, charge, shown, using

# ---------------------------------------------------------------- show


SHOWN = """\
tenant       job      day         candidates  asked  computed  cached  coalesced  GFLOPs  device s       money
blue         b        2026-01-31          12     12         0      12          0       0  0.000000  0.0000 EUR
                      2026-02-01          40     40        40       0          0      80  0.000040  0.0600 EUR
red          other    2026-02-01           3      3         3       0          0       6  0.000003  0.0045 EUR
             sweep/a  2026-01-30       1,600  1,250     1,000     200         50   2,000  0.001000  1.5000 EUR
                      2026-01-31         570    570       570       0          0   1,140  0.000570  0.9600 EUR
--------------------------------------------------------------------------------------------------------------
blue                  all days            52     52        40      12          0      80  0.000040  0.0600 EUR
red                   all days         2,173  1,823     1,573     200         50   3,146  0.001573  2.4645 EUR
all tenants           all days         2,225  1,875     1,613     212         50   3,226  0.001613  2.5245 EUR

not charged   samples  GFLOPs  device s
own/warm-up        64   128.0  0.000064
wasted/crash        7    14.0  0.000000

forwarded 1684 = charged 1613 + wasted 7 + own 64
"""


def test_show_is_a_table_with_sums(full):
    assert shown(full, "show") == SHOWN


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
    assert int(sums[-1].split("all days")[1].split()[1].replace(",", "")) == asked
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
                "1613 samples charged, but the lines hold 1614",
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
