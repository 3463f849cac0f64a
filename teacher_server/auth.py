"""Who asks: the tenant and role behind a token, and the job that the caller names."""

import hmac
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from protos.conformance import check_job_name
from protos.wire import MalformedMessage
from teacher_server.errors import InvalidQuery, NotAllowed, Unauthenticated
from teacher_server.reloading import Reloaded
from teacher_server.tokens import Role, Token, check_tenant_name, digest_of, read_tokens

__all__ = ["Authenticator", "Caller", "Identity", "check_tenant_name"]


class Caller(NamedTuple):
    tenant: str
    job: str


class Identity(NamedTuple):
    tenant: str
    role: Role

    @property
    def asks(self) -> bool:
        """Whether it may have samples computed, and looked up."""
        return self.role != "viewer"

    @property
    def sees_all(self) -> bool:
        """Whether it may see what other tenants spend, and the server's metrics."""
        return self.role != "student"

    @property
    def administers(self) -> bool:
        """Whether it may set and remove budgets."""
        return self.role == "admin"


_EVERYONE = Identity("default", "admin")


class Authenticator:
    """Tokens by their SHA-256. Without any, everyone is tenant `default` and an admin: for loopback only.

    `known` gives the tokens of this moment. `failed` is told of each attempt that was refused: "missing" (no token),
    "unknown" or "role".
    """

    def __init__(
        self,
        known: Callable[[], Mapping[str, Token]] | None = None,
        failed: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._known, self._failed = known, failed

    @classmethod
    def from_file(
        cls,
        path: Path | None,
        failed: Callable[[str], object] = lambda _: None,
        stale: Callable[[bool], object] = lambda _: None,
    ) -> "Authenticator":
        """The tokens of a file, as it stands from moment to moment. Raises OSError, or ValueError naming the line.

        `stale` is told whether a changed file could not be read: then the tokens known before stay in force.
        """
        return cls(None if path is None else Reloaded([path], partial(read_tokens, path), stale), failed)

    def identify(self, metadata: Mapping[str, str]) -> Identity:
        """Whose token a call carries. Raises Unauthenticated."""
        if self._known is None:
            return _EVERYONE
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            self._failed("missing")
            raise Unauthenticated("authorization: no token given; send 'authorization: Bearer TOKEN'")
        given = digest_of(token)
        found = self._known().get(given)
        if found is None or not hmac.compare_digest(found.digest, given):
            self._failed("unknown")
            raise Unauthenticated("authorization: this token is not known here; ask the platform's owner for one")
        return Identity(found.tenant, found.role)

    def caller(self, metadata: Mapping[str, str], *, asks: bool = True) -> Caller:
        """The caller that a call's metadata stands for.

        Raises Unauthenticated, NotAllowed for a viewer who `asks`, InvalidQuery for a bad job name.
        """
        identity = self.identify(metadata)
        if asks and not identity.asks:
            self.refuse(
                f"this token of tenant {identity.tenant!r} is a viewer's, which asks no teacher; take a student's"
            )
        job = metadata.get("preceptor-job") or "default"
        try:
            check_job_name(job)
        except MalformedMessage as error:
            raise InvalidQuery(f"preceptor-job: {error}") from error
        return Caller(identity.tenant, job)

    def refuse(self, why: str) -> NoReturn:
        """Refuses, and counts, what a known token's role does not allow. Raises NotAllowed."""
        self._failed("role")
        raise NotAllowed(why)
