"""Spend and budgets over HTTP. Shapes are the protobuf JSON of the contract's messages where there is one."""

import asyncio
from datetime import UTC, date, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Security
from fastapi.security import HTTPBearer
from google.protobuf import json_format
from google.protobuf.message import Message
from pydantic import BaseModel, ConfigDict, Field

from protos import teacher_pb2 as pb
from teacher_server.accounts import Books
from teacher_server.auth import Caller, Identity
from teacher_server.budgets import LARGEST_LIMIT, Period, State, Unit, budget_message, budget_states, one_of, set_budget
from teacher_server.http_guard import Guard

_ALL = "*"
_TENANT = "/v1/budgets/{tenant}"
_JOB = f"{_TENANT}/jobs/{{job:path}}"
_Job = Annotated[str, Path(min_length=1, description="its name, as it is; it may hold slashes")]


class _Refusal(BaseModel):
    reason: str
    detail: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": _Refusal, "description": "what was given is not understood"},
    401: {"model": _Refusal, "description": "no token, or one that is not known"},
    403: {"model": _Refusal, "description": "not with this token's role"},
    503: {"model": _Refusal, "description": "the ledger does not answer: ask again, or another replica"},
    "default": {"model": _Refusal, "description": "anything else"},  # or FastAPI adds the 422 that we turn into 400
}
_MISSING: dict[int | str, dict[str, Any]] = {404: {"model": _Refusal, "description": "there is no such budget"}}


class _Limit(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    unit: Unit
    """What is limited: computed samples, or their price."""
    period: Period = "total"
    """The UTC day or month after which it begins anew; total: never."""
    limit: int = Field(ge=0, le=LARGEST_LIMIT, strict=True)
    """Samples, or 1e-9 of the currency."""


def routes(guard: Guard, books: Books) -> APIRouter:
    async def states_of(tenant: str) -> list[State]:
        await books.post()
        return await budget_states(books.store, tenant)

    async def set_one(asker: Identity, tenant: str, job: str, given: _Limit) -> dict[str, Any]:
        # Answered once Redis has it, as it has all spend; its file is synced every second.
        who = f"http:{asker.tenant}"
        await set_budget(books.store, tenant, job, given.unit, given.period, limit=given.limit, who=who)
        if (state := one_of(await states_of(tenant), job, given.unit, given.period)) is None:
            raise _none_such(tenant, job, given.unit, given.period)
        return _json(budget_message(state))

    async def remove_one(asker: Identity, tenant: str, job: str, unit: Unit, period: Period) -> None:
        if one_of(await budget_states(books.store, tenant), job, unit, period) is None:
            raise _none_such(tenant, job, unit, period)
        await set_budget(books.store, tenant, job, unit, period, limit=None, who=f"http:{asker.tenant}")

    # The scheme is for the page of the docs alone: it lets one give a token there.
    router = APIRouter(responses=REFUSALS, dependencies=[Security(HTTPBearer(auto_error=False))])
    anyone, admin = Depends(guard.anyone), Depends(guard.admin)

    @router.get("/v1/spend", summary="What was spent, as the Spend call gives it")
    async def get_spend(
        asker: Annotated[Identity, anyone],
        tenant: Annotated[str | None, Query(description="another tenant, or * for all; for viewers and admins")] = None,
        job: Annotated[str, Query(description="one job; all without it")] = "",
        since: Annotated[date | None, Query(description="the first UTC day")] = None,
        until: Annotated[date | None, Query(description="the last UTC day")] = None,
    ) -> dict[str, Any]:
        """A SpendResponse. For `tenant=*` it holds the platform's own account, `_platform`, too, and no budgets."""
        whose = asker.tenant if tenant is None else tenant
        guard.see(asker, whose)
        request = pb.SpendRequest(job=job)
        for field, day in (("since", since), ("until", until)):
            if day is not None:
                getattr(request, field).FromDatetime(datetime(day.year, day.month, day.day, tzinfo=UTC))
        reply = await books.spend(Caller("" if whose == _ALL else whose, job), request)
        if whose == _ALL:
            reply.ClearField("budgets")  # a Budget does not say whose the job is: /v1/budgets does
        return await asyncio.to_thread(_json, reply)

    @router.get("/v1/budgets", summary="Your tenant's budgets; for a viewer or an admin, everybody's")
    async def all_budgets(asker: Annotated[Identity, anyone]) -> dict[str, Any]:
        """`tenants`: for each what `/v1/budgets/{tenant}` gives."""
        states = await states_of("" if asker.sees_all else asker.tenant)
        return {"tenants": [_of_tenant(tenant, states) for tenant in sorted({state["tenant"] for state in states})]}

    @router.get(_TENANT, summary="A tenant's budgets, and those of its jobs")
    async def tenant_budgets(asker: Annotated[Identity, anyone], tenant: str) -> dict[str, Any]:
        """`tenant`, and `budgets`: messages of type Budget."""
        guard.see(asker, tenant)
        return _of_tenant(tenant, await states_of(tenant))

    @router.put(_TENANT, summary="Set a tenant's budget")
    async def put_tenant(asker: Annotated[Identity, admin], tenant: str, given: _Limit) -> dict[str, Any]:
        """The Budget as it stands now. What was spent before counts. For admins."""
        return await set_one(asker, tenant, "", given)

    @router.put(_JOB, summary="Set a job's budget")
    async def put_job(asker: Annotated[Identity, admin], tenant: str, job: _Job, given: _Limit) -> dict[str, Any]:
        """The Budget as it stands now. What was spent before counts. For admins."""
        return await set_one(asker, tenant, job, given)

    @router.delete(_TENANT, summary="Remove a tenant's budget", status_code=204, responses=_MISSING)
    async def delete_tenant(
        asker: Annotated[Identity, admin], tenant: str, unit: Unit, period: Period = "total"
    ) -> None:
        """For admins."""
        await remove_one(asker, tenant, "", unit, period)

    @router.delete(_JOB, summary="Remove a job's budget", status_code=204, responses=_MISSING)
    async def delete_job(
        asker: Annotated[Identity, admin], tenant: str, job: _Job, unit: Unit, period: Period = "total"
    ) -> None:
        """For admins."""
        await remove_one(asker, tenant, job, unit, period)

    return router


def _of_tenant(tenant: str, states: list[State]) -> dict[str, Any]:
    return {
        "tenant": tenant,
        "budgets": [_json(budget_message(state)) for state in states if state["tenant"] == tenant],
    }


def _none_such(tenant: str, job: str, unit: Unit, period: Period) -> HTTPException:
    whose = f"job {job!r} of tenant {tenant!r}" if job else f"tenant {tenant!r}"
    return HTTPException(
        404, f"{whose} has no budget of {unit}, per {period}; GET /v1/budgets/{tenant} lists what it has"
    )


def _json(message: Message) -> dict[str, Any]:
    """With zeros, so that every line has every column."""
    return json_format.MessageToDict(message, always_print_fields_with_no_presence=True)
