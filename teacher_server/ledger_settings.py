"""The knobs of `teacher-server ledger ...`. They read the same environment and the same TOML file as the server."""

from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, SecretStr, model_validator
from pydantic_settings import CliPositionalArg, CliSuppress

from protos.settings import Settings
from teacher_server.config import LedgerConfig, ReplicasConfig, ServeSettings, StoreConfig


class _LedgerSettings(StoreConfig, Settings, env_prefix="TEACHER_"):
    keys_of_others: ClassVar[Mapping[str, Any]] = ServeSettings.model_fields | ReplicasConfig.model_fields
    cache_redis_url: CliSuppress[SecretStr | None] = None
    """Nothing of the cache is read."""


class _Filter(BaseModel, use_attribute_docstrings=True):
    tenant: str = ""
    """Of this tenant only."""
    job: str = ""
    """Of this job only."""
    since: date | None = None
    """The first day, 2026-01-31, in UTC."""
    until: date | None = None
    """The last day, in UTC."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.since and self.until and self.since > self.until:
            raise ValueError(f"since: {self.since} is after --until {self.until}")
        return self

    @property
    def filtered(self) -> bool:
        return bool(self.tenant or self.job or self.since or self.until)


class ShowSettings(_Filter, _LedgerSettings):
    """Show what was spent, and what is left of budgets."""

    audit: bool = False
    """The last changes of budgets and prices instead."""


class ExportSettings(_Filter, _LedgerSettings):
    """Write what was spent as CSV, or all of the ledger as a backup."""

    output: Path | None = None
    """The file; standard output without it."""
    format: Literal["csv", "backup"] = "csv"
    """csv: a line for each tenant, job, day, fingerprint and price. backup: everything, for `ledger restore`."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.format == "backup" and self.filtered:
            raise ValueError("format: a backup is of everything; leave out --tenant, --job, --since and --until")
        return self


class VerifySettings(_LedgerSettings):
    """Check that the books add up; status 1 where they do not."""


class RestoreSettings(LedgerConfig, _LedgerSettings):
    """Put back a backup, or what a replica that will not come back has left in its state directory.

    A backup goes into an empty ledger. A replica's journal is settled: what it had computed and Redis did not know of
    is charged, what it was computing is booked as wasted; what is known already is not counted again.
    """

    path: CliPositionalArg[Path]
    """A file made by `ledger export --format backup`, or the state directory of such a replica."""


class BudgetSettings(_LedgerSettings):
    """List budgets, set one, or remove one.

    A tenant or a job may have several, of samples and of money, in all and for each day or month: all must have room.
    What was spent before a budget was set counts.
    """

    tenant: CliPositionalArg[str] = ""
    """Whose budget; without one, and without a limit, all are listed."""
    job: CliPositionalArg[str] = ""
    """The job, where it is not for the whole tenant."""
    samples: int | None = Field(default=None, ge=0)
    """Computed samples that may be charged."""
    money: Decimal | None = Field(default=None, ge=0, max_digits=16, decimal_places=9)
    """Money that may be charged, in the currency of the price: 12.50"""
    remove: Literal["samples", "money"] | None = None
    """Remove the budget of samples, or that of money, of the period given by --per."""
    per: Literal["total", "day", "month"] = "total"
    """The time after which it begins anew, in UTC; total: never."""

    @model_validator(mode="after")
    def _one_change(self) -> Self:
        given = [name for name in ("samples", "money", "remove") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of them; each is a budget of its own")
        if given and not self.tenant:
            raise ValueError(f"{given[0]}: whose budget? give TENANT, or TENANT JOB")
        if not given and "per" in self.model_fields_set:
            raise ValueError("per: give --samples, --money or --remove with it; without them budgets are listed")
        return self
