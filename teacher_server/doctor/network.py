"""Where the server is to be reached, by whom, and whom it is to reach."""

import errno
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from teacher_server.addresses import advertised, is_loopback
from teacher_server.config import ServeSettings
from teacher_server.doctor.findings import Finding, from_error, note, ok, problem
from teacher_server.tokens import ROLES, Token, digest_of, read_tokens

_CONNECT_SECONDS = 2.0
_MAKE_TOKENS = "make one with teacher-server token new"
_NO_TOKEN = digest_of("")


def ports(settings: ServeSettings) -> Iterator[Finding]:
    """Binds each for a moment."""
    wanted = {"grpc_port": settings.grpc_port, "http_port": settings.http_port}
    if settings.grpc_port and settings.grpc_port == settings.http_port:
        said = f"--grpc-port and --http-port are both {settings.grpc_port}"
        yield problem("ports", said, "give two different ones")
        return
    for name, port in wanted.items():
        flag = f"--{name.replace('_', '-')}"
        where = settings.address(port)
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind) as trying:
                trying.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trying.bind(address)
                trying.listen()
        except socket.gaierror as error:
            yield problem("ports", f"--host {settings.host}: {error.strerror}", "give an address of this machine")
            return
        except OSError as error:
            fix = f"give another {flag}"
            if error.errno == errno.EADDRNOTAVAIL:
                fix = "give --host an address of this machine"
            elif error.errno == errno.EADDRINUSE:
                fix = f"end whoever listens there (ss -ltnp 'sport = :{port}'), or {fix}"
            yield problem("ports", f"{flag}: cannot bind {where} ({error.strerror})", fix)
        else:
            yield ok("ports", f"{flag}: {where} is free" if port else f"{flag}: a free one each time")


def reach(settings: ServeSettings) -> Iterator[Finding]:
    """Who can reach it, and what he needs."""
    local = is_loopback(settings.host)
    if settings.tokens_file is None and not local:
        said = f"--host {settings.host} can be reached from outside and there are no tokens"
        yield problem("access", said, "give --tokens-file, or --host 127.0.0.1")
    elif settings.tokens_file is None:
        yield ok("access", "from this machine only; whoever is on it is tenant default, and an admin")
    elif local:
        yield ok("access", "from this machine only, with a token")
    else:
        yield ok("access", f"on {settings.host}, with a token")


def replicas(settings: ServeSettings) -> Iterator[Finding]:
    """Whether students are told of it by others of its ledger."""
    if settings.ledger_redis_url is not None and advertised(settings, settings.grpc_port) is None:
        said = f"--host {settings.host} is all interfaces, so students are not told of this replica by the others"
        yield note("replicas", said, "give --advertise-address, where students reach it, if there are others")


def tokens(settings: ServeSettings) -> Iterator[Finding]:
    """The tokens file: who may read it, whether it can be read, what is odd in it."""
    path = settings.tokens_file
    if path is None:
        return
    try:
        mode = path.stat().st_mode
        known = read_tokens(path)
    except OSError as error:
        yield problem("tokens", f"--tokens-file {path}: {error.strerror}", f"{_MAKE_TOKENS}, readable by this user")
        return
    except ValueError as error:
        yield from_error("tokens", error, "mend that line, or remove it")
        return
    if (whose := _too_open(mode)) is not None:
        yield problem("tokens", f"{path} has mode {stat.S_IMODE(mode):04o}: {whose} it", f"chmod 600 {path}")
    yield from _entries(path, list(known.values()))


def _too_open(mode: int) -> str | None:
    """It holds no tokens, but tenants and names, and who writes it lets himself in."""
    for bit, whose in (
        (stat.S_IWOTH, "everybody may write"),
        (stat.S_IWGRP, "its group may write"),
        (stat.S_IROTH, "everybody may read"),
    ):
        if mode & bit:
            return whose
    return None


def _entries(path: Path, entries: list[Token]) -> Iterator[Finding]:
    if not entries:
        yield problem("tokens", f"{path} holds no token, so nobody may ask", _MAKE_TOKENS)
        return
    if any(token.digest == _NO_TOKEN for token in entries):
        said = f"{path} holds the hash of an empty token, which nobody can send"
        yield problem("tokens", said, f"remove the line that begins with {_NO_TOKEN[:8]}; {_MAKE_TOKENS}")
    tenants = sorted({token.tenant for token in entries})
    folded: dict[str, str] = {}
    for tenant in tenants:
        if (other := folded.setdefault(tenant.lower(), tenant)) != tenant:
            said = f"{path}: tenants {other!r} and {tenant!r} differ in case alone, and have two bills"
            yield note("tokens", said, "write one of them everywhere, if they are one")
    roles = {role: sum(token.role == role for token in entries) for role in ROLES}
    if not roles["admin"]:
        said = f"{path}: nobody is an admin, so nobody sets budgets over HTTP"
        yield note("tokens", said, f"teacher-server token new --tokens-file {path} TENANT --role admin")
    yield ok(
        "tokens",
        f"{path}: {len(tenants)} {'tenant' if len(tenants) == 1 else 'tenants'}, tokens of "
        + ", ".join(f"{number} {role}{'' if number == 1 else 's'}" for role, number in roles.items()),
    )


def collector(settings: ServeSettings) -> Iterator[Finding]:
    """Whether somebody listens where spans go."""
    if settings.otlp_endpoint is None:
        return
    where = urlsplit(settings.otlp_endpoint)
    port = where.port or (443 if where.scheme == "https" else 80)
    try:
        socket.create_connection((where.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        said = f"nobody listens at {settings.otlp_endpoint} ({error.strerror or error}): spans will be lost"
        yield note("traces", said, "start the collector there (OTLP over gRPC, 4317 mostly), or mend --otlp-endpoint")
    else:
        yield ok("traces", f"somebody listens at {settings.otlp_endpoint}")
