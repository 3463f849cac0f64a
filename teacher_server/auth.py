"""Who asks: the tenant behind a token, and the job that the caller names."""

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from protos.conformance import check_job_name
from protos.wire import MalformedMessage
from teacher_server.errors import InvalidQuery, Unauthenticated

_TENANT = re.compile(r"[A-Za-z0-9.-][A-Za-z0-9._-]{0,63}")


class Caller(NamedTuple):
    tenant: str
    job: str


def check_tenant_name(tenant: str) -> None:
    """Raises ValueError for a name that is none; those with a leading "_" are the platform's own."""
    if not _TENANT.fullmatch(tenant):
        raise ValueError(f"tenant {tenant[:64]!r}: a name is 1 to 64 letters, digits or . _ -, and begins without _")


class Authenticator:
    """Tokens by their SHA-256. Without any, everyone is tenant `default` and an admin: for loopback only."""

    def __init__(self, tenants: Mapping[str, tuple[str, bool]] | None = None) -> None:
        """`tenants`: for the SHA-256 of each token its tenant, and whether it is an admin's."""
        self._tenants = tenants

    @classmethod
    def from_file(cls, path: Path | None) -> "Authenticator":
        """Reads lines of `SHA256-OF-TOKEN TENANT [admin]`; '#' starts a comment. Raises ValueError naming the line."""
        if path is None:
            return cls()
        tenants: dict[str, tuple[str, bool]] = {}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            named = len(words) > 1 and re.fullmatch(r"[0-9a-f]{64}", words[0]) and _TENANT.fullmatch(words[1])
            if not named or words[2:] not in ([], ["admin"]):
                raise ValueError(
                    f"{path}:{number}: expected 'SHA256-OF-TOKEN TENANT', perhaps with 'admin' behind it "
                    "(printf %s TOKEN | sha256sum); a tenant's name begins without _"
                )
            if words[0] in tenants:
                raise ValueError(f"{path}:{number}: this token stands in the file already, for {tenants[words[0]][0]}")
            tenants[words[0]] = (words[1], words[2:] == ["admin"])
        return cls(tenants)

    def caller(self, metadata: Mapping[str, str]) -> Caller:
        """The caller that a call's metadata stands for. Raises Unauthenticated, or InvalidQuery for a bad job name."""
        job = metadata.get("preceptor-job") or "default"
        try:
            check_job_name(job)
        except MalformedMessage as error:
            raise InvalidQuery(f"preceptor-job: {error}") from error
        tenant, _ = self._who(metadata)
        return Caller(tenant, job)

    def is_admin(self, metadata: Mapping[str, str]) -> bool:
        """Whether the call may set budgets and see others' spend. Raises Unauthenticated."""
        return self._who(metadata)[1]

    def _who(self, metadata: Mapping[str, str]) -> tuple[str, bool]:
        if self._tenants is None:
            return "default", True
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("authorization: no token given; send 'authorization: Bearer TOKEN'")
        given = hashlib.sha256(token.encode()).hexdigest()
        found = None
        for known, who in self._tenants.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, given):
                found = who
        if found is None:
            raise Unauthenticated("authorization: this token is not known here; ask the platform's owner for one")
        return found
