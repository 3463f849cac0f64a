"""The server's certificate and key, and the CAs of its clients: do they fit, who may read them, how long do they hold.

A certificate is looked at as a client sees it: in a handshake, in memory, with the certificate itself to be trusted.
"""

import ssl
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from teacher_server.addresses import is_loopback
from teacher_server.config import ServeSettings
from teacher_server.doctor.findings import Finding, from_error, note, ok, problem
from teacher_server.tls import Certificates

_SOON_SECONDS = 14 * 86400
_RENEW = "renew it, and put it in the same file: the server takes it with the next connection"


def certificates(settings: ServeSettings) -> Iterator[Finding]:
    certificate, key = settings.tls_certificate_file, settings.tls_key_file
    if certificate is None or key is None:
        if is_loopback(settings.host):
            yield ok("tls", "none: what is sent stays on this machine")
        else:
            said = f"tokens and samples travel in clear on --host {settings.host}"
            yield note("tls", said, "give --tls-certificate-file and --tls-key-file")
        return
    try:
        Certificates.of(settings, lambda _: None)
        mode = key.stat().st_mode
    except OSError as error:
        said = f"{error.filename or certificate}: {error.strerror}"
        yield problem("tls", said, "give files (PEM) that this user may read")
        return
    except ValueError as error:
        yield from_error("tls", error, "give a certificate (PEM) and its own key")
        return
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        said = f"the key {key} has mode {stat.S_IMODE(mode):04o}: others may use it"
        yield problem("tls", said, f"chmod 600 {key}")
    yield _of_server(certificate, key)
    if settings.tls_client_ca_file is not None:
        yield from _of_clients(settings.tls_client_ca_file)


def _of_server(certificate: Path, key: Path) -> Finding:
    try:
        seen = _as_clients_see_it(certificate, key)
    except ssl.SSLCertVerificationError as error:
        said = f"{certificate}: {error.verify_message}"
        return problem("tls", said, _RENEW if "expired" in error.verify_message else "give another, or set the clock")
    names = [value for kind, value in seen.get("subjectAltName", ()) if kind in {"DNS", "IP Address"}]
    if not names:
        said = f"{certificate} names no host (subjectAltName), so no client believes it"
        return problem("tls", said, "have it made anew for the host names that clients use")
    return _lasting(f"{certificate}, for {', '.join(names)}", seen["notAfter"])


def _of_clients(file: Path) -> Iterator[Finding]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_verify_locations(file)
    found: list[dict[str, Any]] = context.get_ca_certs()
    if not found:
        yield problem("tls", f"{file} holds no certificate of a CA, so no client is let in", "give the CA's own (PEM)")
    for one in found:
        name = next(
            (value for part in one["subject"] for kind, value in part if kind == "commonName"), "without a name"
        )
        yield _lasting(f"{file}: clients of CA {name!r}", one["notAfter"])


def _lasting(what: str, until: str) -> Finding:
    left = ssl.cert_time_to_seconds(until) - time.time()
    said = f"{what}, until {datetime.fromtimestamp(ssl.cert_time_to_seconds(until), UTC):%Y-%m-%d %H:%M} UTC"
    if left <= 0:
        return problem("tls", f"{said}, which is past", _RENEW)
    if left < _SOON_SECONDS:
        return note("tls", f"{said}: {left / 86400:.0f} days", _RENEW)
    return ok("tls", said)


def _as_clients_see_it(certificate: Path, key: Path) -> dict[str, Any]:
    """What a handshake gives of it. Raises ssl.SSLCertVerificationError for one that is not valid now."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(certificate, key)
    client.check_hostname = False  # which name clients use is not known here
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="any"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = True
    while waiting:
        waiting = False
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                waiting = True
    return dict(ends[0].getpeercert() or {})
