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

_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Caller(NamedTuple):
    tenant: str
    job: str


class Authenticator:
    """Tokens by their SHA-256. Without any, everyone is tenant `default`: for loopback only."""

    def __init__(self, tenants: Mapping[str, str] | None = None) -> None:
        self._tenants = tenants

    @classmethod
    def from_file(cls, path: Path | None) -> "Authenticator":
        """Reads lines of `SHA256-OF-TOKEN TENANT`; '#' starts a comment. Raises ValueError naming the line."""
        if path is None:
            return cls()
        tenants = {}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) != 2 or not re.fullmatch(r"[0-9a-f]{64}", words[0]) or not _TENANT.fullmatch(words[1]):
                raise ValueError(f"{path}:{number}: expected 'SHA256-OF-TOKEN TENANT' (printf %s TOKEN | sha256sum)")
            tenants[words[0]] = words[1]
        return cls(tenants)

    def caller(self, metadata: Mapping[str, str]) -> Caller:
        """The caller that a call's metadata stands for. Raises Unauthenticated, or InvalidQuery for a bad job name."""
        job = metadata.get("preceptor-job") or "default"
        try:
            check_job_name(job)
        except MalformedMessage as error:
            raise InvalidQuery(f"preceptor-job: {error}") from error
        if self._tenants is None:
            return Caller("default", job)
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("authorization: no token given; send 'authorization: Bearer TOKEN'")
        given = hashlib.sha256(token.encode()).hexdigest()
        tenant = None
        for known, name in self._tenants.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, given):
                tenant = name
        if tenant is None:
            raise Unauthenticated("authorization: this token is not known here; ask the platform's owner for one")
        return Caller(tenant, job)
