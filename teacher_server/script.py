"""ledger.lua, called from Python."""

import json
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from redis.exceptions import ResponseError

from teacher_server.store import LEDGER_PREFIX, Store, StoreUnavailable

PLATFORM = "_platform"
"""The account of what nobody is charged for; its jobs are `own/REASON` and `wasted/REASON`."""
_SCRIPT = files("teacher_server").joinpath("ledger.lua").read_text()


async def run(store: Store, operation: str, **arguments: Any) -> Any:
    """One of the operations that ledger.lua describes, an atomic step.

    Raises StoreUnavailable; also where Redis does answer, but refuses: its memory is full, it is a read-only replica.
    """
    try:
        return json.loads(await store.script(_SCRIPT, LEDGER_PREFIX, operation, json.dumps(arguments)))
    except ResponseError as error:
        raise StoreUnavailable(f"{store.what}: {store.where} refuses: {error}") from error


def today() -> str:
    """The UTC day, "2026-01-31"."""
    return datetime.now(UTC).date().isoformat()
