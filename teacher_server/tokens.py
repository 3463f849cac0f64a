"""The tokens file: lines of `SHA256-OF-TOKEN TENANT [ROLE] [NAME]`. It never holds a token itself."""

import fcntl
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, get_args

Role = Literal["student", "viewer", "admin"]
"""student: asks, and sees what its tenant spent. viewer: sees everything, asks nothing. admin: may do everything."""

ROLES: tuple[Role, ...] = get_args(Role)
PREFIX = "preceptor_"
"""What our tokens begin with, so that those who look for secrets in what is committed find them."""
ID_DIGITS = 8
_RANDOM_BYTES = 32
_TENANT = re.compile(r"[A-Za-z0-9.-][A-Za-z0-9._-]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9@.][A-Za-z0-9._@:/+-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Token(NamedTuple):
    digest: str
    """SHA-256, in hexadecimal."""
    tenant: str
    role: Role = "student"
    name: str = ""

    @property
    def id(self) -> str:
        """What people call it by."""
        return self.digest[:ID_DIGITS]


def check_tenant_name(tenant: str) -> None:
    """Raises ValueError for a name that is none; those with a leading "_" are the platform's own."""
    if not _TENANT.fullmatch(tenant):
        raise ValueError(f"tenant {tenant[:64]!r}: a name is 1 to 64 letters, digits or . _ -, and begins without _")


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def new_token(tenant: str, role: Role = "student", name: str = "") -> tuple[str, Token]:
    """A fresh token, and what the file says of it. Raises ValueError for a tenant or a name that is none."""
    check_tenant_name(tenant)
    if name and (not _NAME.fullmatch(name) or name in ROLES):
        raise ValueError(
            f"name {name[:64]!r}: give 1 to 64 letters, digits or . _ @ : / + -, a letter or digit first, and no "
            "role's name"
        )
    secret = PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    return secret, Token(digest_of(secret), tenant, role, name)


def read_tokens(path: Path) -> dict[str, Token]:
    """By digest. Raises OSError, or ValueError naming the line; it repeats nothing of it: it may be a token."""
    tokens: dict[str, Token] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{number}: {error.reason}; the file has to be UTF-8") from None
    for number, line in enumerate(lines, start=1):
        try:
            token = _parsed(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if token is None:
            continue
        if token.digest in tokens:
            raise ValueError(
                f"{path}:{number}: this token stands in the file already, for {tokens[token.digest].tenant}"
            )
        tokens[token.digest] = token
    return tokens


def _parsed(line: str) -> Token | None:
    words = line.partition("#")[0].split()
    if not words:
        return None
    match words:
        case [digest, tenant, *rest] if _DIGEST.fullmatch(digest) and _TENANT.fullmatch(tenant):
            role: Role = "student"
            for known in ROLES:
                if rest[:1] == [known]:
                    role, rest = known, rest[1:]
            if not rest or (len(rest) == 1 and rest[0] not in ROLES and _NAME.fullmatch(rest[0])):
                return Token(digest, tenant, role, *rest)
    raise ValueError(
        "expected 'SHA256-OF-TOKEN TENANT [student|viewer|admin] [NAME]' (printf %s TOKEN | sha256sum); a tenant's "
        "name begins without _. `teacher-server token new` writes such lines"
    )


def add_token(path: Path, token: Token) -> None:
    """Appends its line to the file, which need not exist. Raises OSError, or ValueError for a file or name as it is."""

    def add(text: str, tokens: Mapping[str, Token]) -> str:
        if token.name and token.name in {known.name for known in tokens.values()}:
            raise ValueError(f"name: {token.name!r} stands in {path} already; give another, or revoke that one first")
        words = (token.digest, token.tenant, token.role, token.name)
        return f"{text.rstrip()}\n{' '.join(filter(None, words))}\n".lstrip()

    _rewrite(path, add)


def remove_token(path: Path, which: str) -> Token:
    """Takes the line of the token with that id (or name) out of the file; all else in it stays as it is.

    Returns what the line said. Raises OSError, or ValueError where it means no token or more than one.
    """
    found: list[Token] = []

    def remove(text: str, tokens: Mapping[str, Token]) -> str:
        digits = len(which) >= ID_DIGITS
        found.extend(t for t in tokens.values() if t.name == which or (digits and t.digest.startswith(which)))
        if len(found) != 1:
            ids = f"several tokens: {', '.join(t.digest for t in found)}" if found else "no token"
            raise ValueError(f"{which[:64]!r} means {ids} in {path}; `teacher-server token list` shows ids and names")
        lines = text.splitlines(keepends=True)
        return "".join(line for line in lines if line.split()[:1] != [found[0].digest])

    _rewrite(path, remove)
    return found[0]


def _rewrite(path: Path, change: Callable[[str, Mapping[str, Token]], str]) -> None:
    """A server that reads meanwhile sees the old file or the new one, whole; two writers wait for one another."""
    path = path.resolve()  # a link stays one
    with _locked(path.with_name(f".{path.name}.lock")):
        tokens = read_tokens(path) if path.exists() else {}
        text = change(path.read_text() if path.exists() else "", tokens)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                _keep_access(path, temporary)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise


def _keep_access(path: Path, temporary: str) -> None:
    """The server may run as another user than the one who writes, and read the file as its owner or by its group.

    Who could read it no more would go by the tokens known before, a revoked one too.
    """
    before = path.stat()
    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(temporary, before.st_uid, before.st_gid)
    Path(temporary).chmod(stat.S_IMODE(before.st_mode))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
