"""Where the server is to be reached, by whom, and whom it is to reach."""

import hashlib
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from teacher_server.auth import Authenticator
from teacher_server.config import ServeSettings
from teacher_server.doctor.findings import Finding, from_error, note, ok, problem
from teacher_server.server import is_loopback

_CONNECT_SECONDS = 2.0
_MAKE_TOKENS = "write lines of SHA256-OF-TOKEN TENANT (printf %s TOKEN | sha256sum)"
_NO_TOKEN = hashlib.sha256(b"").hexdigest()


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
            fix = f"end whoever listens there (ss -ltnp 'sport = :{port}'), or give another {flag}"
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


def tokens(settings: ServeSettings) -> Iterator[Finding]:
    """The tokens file: who may read it, whether it can be read, what is odd in it."""
    path = settings.tokens_file
    if path is None:
        return
    try:
        text, mode = path.read_text(), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        yield problem("tokens", f"--tokens-file {path}: {why}", f"{_MAKE_TOKENS}, readable by this user")
        return
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        who = "everybody may write" if mode & stat.S_IWOTH else "others may read"
        who = "its group may write" if mode & stat.S_IWGRP and not mode & (stat.S_IROTH | stat.S_IWOTH) else who
        yield problem("tokens", f"{path} has mode {stat.S_IMODE(mode):04o}: {who} it", f"chmod 600 {path}")
    try:
        Authenticator.from_file(path)
    except ValueError as error:
        yield from_error("tokens", error, "mend that line, or remove it")
        return
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    yield from _entries(path, [words for words in lines if words])


def _entries(path: Path, entries: list[list[str]]) -> Iterator[Finding]:
    if not entries:
        yield problem("tokens", f"{path} holds no token, so nobody may ask", _MAKE_TOKENS)
        return
    if any(words[0] == _NO_TOKEN for words in entries):
        said = f"{path} holds the hash of an empty token, which nobody can send"
        yield problem("tokens", said, "remove that line: printf %s TOKEN | sha256sum with the token put in")
    tenants = sorted({words[1] for words in entries})
    folded: dict[str, str] = {}
    for tenant in tenants:
        if (other := folded.setdefault(tenant.lower(), tenant)) != tenant:
            said = f"{path}: tenants {other!r} and {tenant!r} differ in case alone, and have two bills"
            yield note("tokens", said, "write one of them everywhere, if they are one")
    admins = sum(words[2:3] == ["admin"] for words in entries)
    if not admins:
        said = f"{path}: nobody is an admin, so nobody sets budgets or sees all spend over HTTP"
        yield note("tokens", said, "write 'admin' behind the tenant of one token")
    yield ok("tokens", f"{path}: {len(entries)} tokens of {len(tenants)} tenants, {admins} of admins")


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
