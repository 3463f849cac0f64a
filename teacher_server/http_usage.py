"""Where the compute went, over HTTP: for the page at `/`, for spreadsheets and scripts."""

import asyncio
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response, Security
from fastapi.security import HTTPBearer

from protos import teacher_pb2 as pb
from teacher_server.accounts import Books
from teacher_server.errors import Draining, InvalidQuery
from teacher_server.http_accounts import REFUSALS
from teacher_server.http_guard import Guard
from teacher_server.service import Service
from teacher_server.usage import Usage, usage

_Hours = Annotated[int | None, Query(ge=1, le=168, description="so many UTC hours, the present one included; or")]
_Days = Annotated[int | None, Query(ge=1, le=400, description="so many UTC days")]
_DEFAULT_HOURS = 24


def usage_routes(guard: Guard, books: Books, service: Service) -> APIRouter:
    async def found(hours: int | None, days: int | None) -> Usage:
        if hours is not None and days is not None:
            raise InvalidQuery(f"hours: {hours}, and days: {days}; give one of them")
        await books.post()
        return await usage(books.store, "day" if days else "hour", days or hours or _DEFAULT_HOURS)

    # The scheme is for the page of the docs alone: it lets one give a token there.
    router = APIRouter(responses=REFUSALS, dependencies=[Depends(guard.viewer), Security(HTTPBearer(auto_error=False))])

    @router.get("/v1/usage", summary="Where the teacher's compute went, by hour or by day")
    async def get_usage(hours: _Hours = None, days: _Days = None) -> Response:
        """By period and job: samples (candidates, asked, computed, cached, coalesced), FLOPs, device nanoseconds and
        money in 1e-9 of its currency; the platform's own account, budgets and teachers. 24 hours unless told otherwise.

        `rows` is columnar: row i is of `periods[rows.period[i]]` and of `jobs[rows.job[i]]`, which is tenant, job,
        currency and price of a sample. 64-bit numbers are text, as in protobuf's JSON. For viewers and admins.
        """
        one = await found(hours, days)
        served: set[str] = set()
        with suppress(Draining):
            served = {teacher.fingerprint for teacher in (await service.describe(pb.DescribeRequest())).teachers}
        return Response(await asyncio.to_thread(one.json, served), media_type="application/json")

    @router.get("/v1/usage.csv", summary="The same as CSV", response_class=Response)
    async def get_csv(hours: _Hours = None, days: _Days = None) -> Response:
        """A line for each period, tenant, job and price; the platform's own account is tenant `_platform`."""
        one = await found(hours, days)
        headers: dict[str, Any] = {"content-disposition": f'attachment; filename="preceptor-by-{one.by}.csv"'}
        return Response(await asyncio.to_thread(one.csv), media_type="text/csv; charset=utf-8", headers=headers)

    return router
