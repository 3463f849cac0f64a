"""Who may see and change what over HTTP: what a route depends on, and so says in its signature."""

from fastapi import Request

from teacher_server.auth import Authenticator, Identity


class Guard:
    """Each method but `see` is a FastAPI dependency: `asker: Annotated[Identity, Depends(guard.viewer)]`.

    They raise Unauthenticated without a known token, and NotAllowed where its role does not reach.
    """

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def anyone(self, request: Request) -> Identity:
        """Any token."""
        return self._identify(request)

    async def viewer(self, request: Request) -> Identity:
        """A viewer or an admin: who sees what all tenants do."""
        identity = self._identify(request)
        if not identity.sees_all:
            self._authenticator.refuse(
                f"only a viewer or an admin may see this; this token of tenant {identity.tenant!r} is a student's, "
                "whose own spend is at /v1/spend"
            )
        return identity

    async def admin(self, request: Request) -> Identity:
        identity = self._identify(request)
        if not identity.administers:
            self._authenticator.refuse(
                f"only an admin may set or remove budgets; this token of tenant {identity.tenant!r} is a "
                f"{identity.role}'s"
            )
        return identity

    def _identify(self, request: Request) -> Identity:
        identity = self._authenticator.identify(request.headers)
        request.state.tenant = identity.tenant  # for the access log
        return identity

    def see(self, asker: Identity, tenant: str) -> None:
        """Refuses to show a tenant's spend and budgets to a student of another."""
        if not asker.sees_all and tenant != asker.tenant:
            self._authenticator.refuse(
                f"tenant: {tenant!r} is not yours, {asker.tenant!r}; only a viewer or an admin may see other tenants'"
            )
