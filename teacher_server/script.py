"""ledger.lua, called from Python."""

import json
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any

from redis.exceptions import ResponseError

from teacher_server.store import LEDGER_PREFIX, Store, StoreUnavailable

PLATFORM = "_platform"
"""The account of what nobody is charged for; its jobs are `own/REASON` and `wasted/REASON`."""
_HOURS_KEPT = timedelta(days=40)
_SCRIPT = files("teacher_server").joinpath("ledger.lua").read_text()


async def run(store: Store, operation: str, **arguments: Any) -> Any:
    """One of the operations that ledger.lua describes, an atomic step.

    Raises StoreUnavailable; also where Redis does answer, but refuses: its memory is full, it is a read-only replica.
    """
    try:
        return json.loads(await store.script(_SCRIPT, LEDGER_PREFIX, operation, json.dumps(arguments)))
    except ResponseError as error:
        raise StoreUnavailable(f"{store.what}: {store.where} refuses: {error}") from error


def this_hour() -> str:
    """The UTC hour, "2026-01-31T21"; its first ten characters are the day."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H")


def forgotten_at(day: str) -> int:
    """When the ledger drops the hours of a UTC day, in seconds since the epoch; its lines stay."""
    return int((datetime.fromisoformat(day).replace(tzinfo=UTC) + timedelta(days=1) + _HOURS_KEPT).timestamp())


def today() -> str:
    """The UTC day, "2026-01-31"."""
    return datetime.now(UTC).date().isoformat()
