"""What this replica holds of budgets ahead of its charges, so that most queries need not ask Redis.

A purse is a lease in Redis on the budgets of one job. It is topped up by what a query needs and about as much as was
paid in the last second; what is more goes back. A lease that is not renewed lapses, and with it what was held.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from protos import teacher_pb2 as pb
from teacher_server.auth import Caller
from teacher_server.budgets import State, as_state, budget_message, refusal
from teacher_server.errors import LedgerUnavailable
from teacher_server.script import run, today
from teacher_server.store import Store, StoreUnavailable


@dataclass(eq=False)
class Purse:
    lease: str
    caller: Caller
    day: str
    free: int = 0
    held: int = 0
    paid: int = 0
    """Since the last beat; `paid_before` in the one before."""
    paid_before: int = 0
    renewed: float = 0.0
    """time.monotonic() before the last renewal that succeeded was sent."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def reserve(self) -> int:
        return max(self.paid, self.paid_before)


class Hold:
    """Samples that may be computed; each is paid for or released in the end. Of no purse where there is no budget."""

    def __init__(self, purse: Purse | None, samples: int) -> None:
        self._purse = purse
        self.samples = samples
        self.lease, self.day = (purse.lease, purse.day) if purse else ("", today())
        if purse is not None:
            purse.held += samples

    def pay(self, samples: int) -> None:
        self._let_go(samples)
        if self._purse is not None:
            self._purse.paid += samples

    def release(self, samples: int) -> None:
        self._let_go(samples)
        if self._purse is not None:
            self._purse.free += samples

    def _let_go(self, samples: int) -> None:
        if not 0 <= samples <= self.samples:
            raise ValueError(f"{samples} samples of a hold of {self.samples}")
        self.samples -= samples
        if self._purse is not None:
            self._purse.held -= samples


class Purses:
    """All purses of one replica. For the event loop's thread."""

    def __init__(self, store: Store, epoch: str, price: pb.Price, lease_seconds: float) -> None:
        self._store, self._epoch, self._price, self._lease_seconds = store, epoch, price, lease_seconds
        self._owners: set[tuple[str, str]] = set()
        self._current: dict[Caller, Purse] = {}
        self._retired: list[Purse] = []
        self._budgets: dict[tuple[str, str], dict[tuple[str, str], State]] = {}
        self._count = 0

    @property
    def lease_ms(self) -> float:
        return 1000 * self._lease_seconds

    def take(self, caller: Caller, samples: int) -> Hold | None:
        """A hold without asking Redis; None where the purse has less."""
        if (caller.tenant, "") not in self._owners and caller not in self._owners:
            return Hold(None, samples)
        purse = self._purse(caller)
        if purse.free < samples or time.monotonic() > purse.renewed + 0.8 * self._lease_seconds:
            return None
        purse.free -= samples
        return Hold(purse, samples)

    async def hold(self, caller: Caller, samples: int, post: Callable[[], Awaitable[None]]) -> Hold:
        """A hold on all budgets that the caller draws on, all samples or none. `post` brings Redis up to date first.

        Raises BudgetSpent, BudgetReserved, or LedgerUnavailable where the purse has less and Redis does not answer.
        """
        if (held := self.take(caller, samples)) is not None:
            return held
        async with self._purse(caller).lock:  # one top-up at a time
            if (held := self.take(caller, samples)) is not None:
                return held
            try:
                await post()  # or what was spent long since would be said to be reserved
                if (held := self.take(caller, samples)) is not None:
                    return held
                return await self._top_up(self._purse(caller), samples)
            except StoreUnavailable as error:
                raise LedgerUnavailable(
                    f"the budget of job {caller.job!r} of tenant {caller.tenant!r} cannot be drawn on ({error}); ask "
                    "again, or another replica"
                ) from error

    async def _top_up(self, purse: Purse, samples: int) -> Hold:
        sent = time.monotonic()
        try:
            reply = await run(
                self._store,
                "hold",
                tenant=purse.caller.tenant,
                job=purse.caller.job,
                day=purse.day,
                price=self._price.nanos_per_sample,
                need=samples,
                more=purse.reserve,
                lease=purse.lease,
                lease_ms=self.lease_ms,
            )
        except BaseException:  # cancelled, too: Redis may have given what we do not know of
            self.doubt([purse.lease])
            raise
        if reply.get("refused") == "lease":  # another budget was set since the lease was given
            self._retire(purse)
            return await self._top_up(self._purse(purse.caller), samples)
        if "refused" in reply:
            raise refusal(reply["refused"], as_state(reply["budget"]), samples, self._price)
        self.learn(reply["budgets"])
        purse.renewed = sent
        purse.free += reply["granted"] - samples
        if self._current.get(purse.caller) is not purse and purse not in self._retired:  # `beat` found it empty
            self._retired.append(purse)
        return Hold(purse, samples)

    # ------------------------------------------------------------ what is known of budgets

    def learn(self, described: Iterable[dict[str, str]]) -> None:
        for state in map(as_state, described):
            self._budgets.setdefault((state["tenant"], state["job"]), {})[state["unit"], state["period"]] = state

    def owners_are(self, owners: set[tuple[str, str]]) -> None:
        """Budgets were set or removed: (tenant, job) of each, job "" for a tenant's own."""
        self._owners = owners
        self._budgets.clear()
        for purse in list(self._current.values()):  # it holds of the budgets that there were
            self._retire(purse)

    def budgets(self, caller: Caller, unsettled: Callable[[str, str], int]) -> list[pb.Budget]:
        """Those that the caller draws on. `unsettled`: samples of (tenant, job or "") that Redis does not count yet."""
        found = []
        for owner in ((caller.tenant, ""), (caller.tenant, caller.job)):
            for state in self._states(owner):
                each = 1 if state["unit"] == "samples" else self._price.nanos_per_sample
                found.append(budget_message(state, unsettled(*owner) * each))
        return found

    def states(self) -> list[State]:
        """Of all budgets that were drawn on here."""
        return [state for owner in self._budgets for state in self._states(owner)]

    def _states(self, owner: tuple[str, str]) -> list[State]:
        """Not those of a day or month that is over: nobody has drawn on the new one here."""
        present = ("total", today(), today()[: len("2026-01")])
        return [state for state in self._budgets.get(owner, {}).values() if state["instance"] in present]

    # ------------------------------------------------------------ leases

    def excess(self, *, all_of_it: bool) -> list[tuple[str, int]]:
        """Takes out, lease by lease, what goes back: all that is more than was paid lately, or all that is free."""
        back = []
        for purse in self._current.values():
            more = purse.free if all_of_it else purse.free - purse.reserve
            if more > 0:
                purse.free -= more
                back.append((purse.lease, more))
        for purse in self._retired:
            if purse.free:
                back.append((purse.lease, purse.free))
                purse.free = 0
        return back

    def leases(self) -> list[Purse]:
        """Those that Redis has given, to renew."""
        return [purse for purse in (*self._current.values(), *self._retired) if purse.renewed]

    def watched(self) -> list[tuple[str, str, str]]:
        """(tenant, job, day) of those whose budgets are drawn on."""
        return [(*purse.caller, purse.day) for purse in self._current.values()]

    def doubt(self, leases: Iterable[str]) -> None:
        """These leases have lapsed, or it is not certain what Redis knows of them: what is free is left to lapse."""
        for lease in leases:
            for purse in [purse for purse in self._current.values() if purse.lease == lease]:
                purse.free = 0
                self._retire(purse)

    def beat(self) -> None:
        """About a second has passed."""
        for purse in list(self._current.values()):
            purse.paid_before, purse.paid = purse.paid, 0
            if not (purse.free or purse.held or purse.reserve or purse.lock.locked()):
                del self._current[purse.caller]
        self._retired = [purse for purse in self._retired if purse.held or purse.free]

    def _purse(self, caller: Caller) -> Purse:
        purse = self._current.get(caller)
        if purse is not None and purse.day != today():
            self._retire(purse)
            purse = None
        if purse is None:
            self._count += 1
            purse = self._current[caller] = Purse(f"{self._epoch}.{self._count}", caller, today())
        return purse

    def _retire(self, purse: Purse) -> None:
        """Nothing more is taken from it; what is held of it is still paid from it."""
        self._retired.append(purse)
        if self._current.get(purse.caller) is purse:
            del self._current[purse.caller]
