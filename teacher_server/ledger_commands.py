"""`teacher-server ledger ...`: the ledger on the command line, beside running servers or without any.

Each writes to `out` and returns its exit status; what goes wrong is one of FAILURES.
"""

import asyncio
import csv
import getpass
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TextIO

from pydantic import AwareDatetime, BaseModel, ValidationError
from redis.exceptions import RedisError

from protos import teacher_pb2 as pb
from teacher_server import accounts
from teacher_server.accounts import Snapshot, snapshot
from teacher_server.budgets import Unit, audit, budget_states, currencies, one_of, set_budget
from teacher_server.embedded import take_lock
from teacher_server.errors import TeacherServerError
from teacher_server.journal import LeftBehind, left_behind
from teacher_server.ledger_settings import (
    BudgetSettings,
    ExportSettings,
    RestoreSettings,
    ShowSettings,
    VerifySettings,
)
from teacher_server.ledger_tables import audit_table, budget_table, platform_table, spend_table
from teacher_server.postings import Entry, charged, settle
from teacher_server.script import PLATFORM
from teacher_server.store import LEDGER_PREFIX, Store, StoreUnavailable, open_ledger, open_stores

FAILURES = (TeacherServerError, StoreUnavailable, RedisError, ValueError, OSError)
_ON_DISK_SECONDS = 15.0
_BACKUP_VERSION = 1


async def show(settings: ShowSettings, out: TextIO) -> int:
    async with open_ledger(settings) as store:
        currency = "/".join(await currencies(store))
        if settings.audit:
            out.write(await _audit(store, settings, currency))
            return 0
        found = await _lines(store, settings)
        states = await budget_states(store, settings.tenant)
    lines = found.lines(settings.job)
    charged_lines = [line for line in lines if line.tenant != PLATFORM]
    own_lines = [line for line in lines if line.tenant == PLATFORM]
    parts = [spend_table(charged_lines) if charged_lines else "nothing was spent\n"]
    if own_lines:
        parts.append(platform_table(own_lines))
    if not settings.filtered:
        summary, problems = found.verify()
        doubt = f"; {len(problems)} contradictions, see teacher-server ledger verify" if problems else ""
        parts.append(f"{summary}{doubt}\n")
    if states := [state for state in states if settings.job in ("", state["job"]) or not state["job"]]:
        parts.append(budget_table(states, currency))
    out.write("\n".join(parts))
    return 0


async def export(settings: ExportSettings, out: TextIO) -> int:
    async with open_ledger(settings) as store:
        found = await (snapshot(store, everything=True) if settings.format == "backup" else _lines(store, settings))

    def write(file: TextIO) -> None:
        if settings.format == "backup":
            _write_backup(found, file)
        else:
            _write_csv(found.lines(settings.job), file)

    if settings.output is None:
        write(out)
    else:
        unfinished = settings.output.with_name(f"{settings.output.name}.unfinished")
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(settings.output)
    return 0


async def verify(settings: VerifySettings, out: TextIO) -> int:
    async with open_ledger(settings) as store:
        return _verified(await snapshot(store, everything=True), out)


async def restore(settings: RestoreSettings, out: TextIO) -> int:
    if settings.path.is_dir():
        return await _settle(settings, out)
    backup = _read_backup(settings.path)
    async with _to_fill(settings) as store:
        await accounts.restore(store, _keys(backup), _who())
        out.write(f"restored the ledger of {backup.time:%Y-%m-%d %H:%M:%S %Z}\n")
        if not await _on_disk(store):
            out.write(f"{store.where} has it, but has not said yet that it is on its disk\n")
        return _verified(await snapshot(store, everything=True), out)


async def budget(settings: BudgetSettings, out: TextIO) -> int:
    async with open_ledger(settings) as store:
        if settings.samples is not None:
            await _set_budget(store, settings, "samples", settings.samples, out)
        elif settings.money is not None:
            await _set_budget(store, settings, "money", int(settings.money.scaleb(9)), out)
        elif settings.remove is not None:
            await _set_budget(store, settings, settings.remove, None, out)
        states = [state for state in await budget_states(store, settings.tenant) if settings.job in ("", state["job"])]
        currency = "/".join(await currencies(store))
    out.write(budget_table(states, currency) if states else "there are no budgets\n")
    return 0


# ------------------------------------------------------------ show and export


async def _lines(store: Store, settings: ShowSettings | ExportSettings) -> Snapshot:
    return await snapshot(
        store,
        tenant=settings.tenant,
        since=settings.since.isoformat() if settings.since else "",
        until=settings.until.isoformat() if settings.until else "",
        everything=not settings.filtered,
    )


async def _audit(store: Store, settings: ShowSettings, currency: str) -> str:
    changes = [
        change
        for change in await audit(store)
        if settings.tenant in ("", change.details.get("tenant"))
        and settings.job in ("", change.details.get("job"))
        and (settings.since is None or change.at.date() >= settings.since)
        and (settings.until is None or change.at.date() <= settings.until)
    ]
    return audit_table(changes, currency) if changes else "nothing was changed\n"


def _write_csv(lines: list[pb.SpendLine], file: TextIO) -> None:
    columns = [field.name for field in pb.SpendLine.DESCRIPTOR.fields]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([getattr(line, column) for column in columns] for line in lines)


class _Backup(BaseModel):
    """A whole snapshot: each key's name, type and values."""

    format: Literal["preceptor ledger"]
    version: int
    time: AwareDatetime
    keys: list[tuple[str, Literal["hash", "set", "zset", "stream", "string"], list[str | tuple[str, list[str]]]]]


def _write_backup(whole: Snapshot, file: TextIO) -> None:
    header = {"format": "preceptor ledger", "version": _BACKUP_VERSION, "time": datetime.now(UTC).isoformat()}
    json.dump({**header, "keys": whole.keys}, file)
    file.write("\n")


# ------------------------------------------------------------ verify, restore, budget


def _verified(whole: Snapshot, out: TextIO) -> int:
    summary, problems = whole.verify()
    out.write(f"{summary}\n")
    out.writelines(f"contradiction: {problem}\n" for problem in problems)
    return 1 if problems else 0


def _read_backup(path: Path) -> _Backup:
    try:
        backup = _Backup.model_validate_json(path.read_bytes())
        Snapshot(_keys(backup)).verify()  # or what is damaged would be found when half of it has been put back
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise ValueError(
            f"{path} is no backup of a ledger ({where}: {problem['msg']}); make one with "
            "teacher-server ledger export --format backup"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if backup.version != _BACKUP_VERSION:
        raise ValueError(f"{path} is of version {backup.version}, and this program reads {_BACKUP_VERSION}")
    return backup


def _to_fill(settings: RestoreSettings) -> AbstractAsyncContextManager[Store]:
    """An embedded ledger may not be there yet, and no server may use it meanwhile."""
    return open_ledger(settings) if settings.ledger_redis_url else _embedded_ledger(settings)


@asynccontextmanager
async def _embedded_ledger(settings: RestoreSettings) -> AsyncIterator[Store]:
    async with open_stores(settings.model_copy(update={"cache_redis_url": None}), 2**20) as stores:
        yield stores.ledger


async def _settle(settings: RestoreSettings, out: TextIO) -> int:
    lefts = _left_in(settings.path)
    if not lefts:
        out.write(f"nothing is left behind in {settings.path}\n")
        return 0
    async with open_ledger(settings) as store:
        for left in lefts:
            applied = int(await store.command("HGET", f"{LEDGER_PREFIX}epochs", left.epoch) or 0)
            await settle(store, left, settings)
            out.write(_settled(left, applied))
        if not await _on_disk(store):
            raise ValueError(
                f"{store.where} has it, but has not said that it is on its disk, so the journal stays in "
                f"{settings.path}; give this command again later: nothing is counted twice"
            )
    for left in lefts:
        for path in left.paths:
            path.unlink(missing_ok=True)
    return 0


def _left_in(state_directory: Path) -> list[LeftBehind]:
    """Of processes that have ended; a server that starts there now settles the same, which then counts once."""
    directory = state_directory / "journal"
    if not directory.is_dir():
        raise ValueError(f"{state_directory}: there is no journal in it; give the replica's --state-directory")
    try:
        lock = take_lock(state_directory / "lock")
    except BlockingIOError:
        raise ValueError(f"{state_directory}: a server runs there, and settles its journal itself") from None
    try:
        return list(left_behind(directory))
    finally:
        os.close(lock)


def _settled(left: LeftBehind, applied: int) -> str:
    """What was new to Redis. Where a budget has no room any more, the ledger says so: it is wasted/unpaid there."""
    samples: Counter[str] = Counter()
    for number, records in left.postings.items():
        if number > applied:
            for caller, count in charged(records).items():
                samples[f"{caller.tenant} {caller.job}"] += count
            for record in records:
                for line in record["lines"]:
                    if line["tenant"] == PLATFORM:
                        samples[line["job"]] += sum(Entry(*charge).samples for charge in line["charges"])
    said = [f"{count:,} of {whose}" for whose, count in sorted(samples.items()) if count]
    return f"{left.epoch}: {'samples: ' + ', '.join(said) if said else 'all of it was known already'}\n"


async def _set_budget(store: Store, settings: BudgetSettings, unit: Unit, limit: int | None, out: TextIO) -> None:
    tenant, job, period = settings.tenant, settings.job, settings.per
    there = one_of(await budget_states(store, tenant), job, unit, period)
    whose = f"of tenant {tenant}" if not job else f"of job {job} of tenant {tenant}"
    if limit is None and not there:
        raise ValueError(f"there is no budget {whose} in {unit}, per {period}; without --remove they are listed")
    await set_budget(store, tenant, job, unit, period, limit=limit, who=_who())
    out.write(f"{'removed' if limit is None else 'changed' if there else 'set'} the budget {whose}\n\n")


def _who() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a container's user without a name
        return f"cli:{os.getuid()}"


async def _on_disk(store: Store) -> bool:
    """Whether what was acknowledged before is on Redis's disk, or is within a time that one can wait."""
    acknowledged, end = time.time(), time.monotonic() + _ON_DISK_SECONDS
    while time.monotonic() < end:
        first, last = await store.durable()
        if first > acknowledged:  # the connection was lost, and perhaps more
            return False
        if acknowledged < last:
            return True
        await asyncio.sleep(0.1)
    return False


def _keys(backup: _Backup) -> list[list[object]]:
    return [[name, kind, values] for name, kind, values in backup.keys]
