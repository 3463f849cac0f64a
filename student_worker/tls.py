"""TLS at the student's end: whom it trusts, what it shows, and what went wrong when no connection came about."""

import socket
import ssl
from pathlib import Path

import grpc

_PROBE_SECONDS = 3.0
# How HTTP/2 begins: the client's preface and empty SETTINGS (RFC 9113, 3.4). A gRPC server answers at once.
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"}


class Tls:
    """`ca_file`: who signs servers' certificates, or else the CAs that this machine knows. The other two: one's own.

    All PEM. Raises OSError for files that are not there, ValueError for what they do not hold.
    """

    def __init__(
        self, ca_file: Path | None = None, certificate_file: Path | None = None, key_file: Path | None = None
    ) -> None:
        if (certificate_file is None) != (key_file is None):
            raise ValueError("certificate_file and key_file: give both, or neither")
        self.shows = certificate_file is not None
        self._paths = ca_file, certificate_file, key_file
        self.context()
        self._files = [None if path is None else path.read_bytes() for path in (ca_file, key_file, certificate_file)]

    def context(self, *protocols: str) -> ssl.SSLContext:
        """Of these files, for what is not gRPC; `protocols` as ALPN names them. Raises as the class does."""
        ca_file, certificate_file, key_file = self._paths
        try:
            context = ssl.create_default_context(cafile=ca_file)
        except ssl.SSLError as error:
            raise ValueError(f"ca_file: {ca_file} holds no certificate (PEM; {error})") from error
        if certificate_file is not None:
            try:
                context.load_cert_chain(certificate_file, key_file)
            except ssl.SSLError as error:
                raise ValueError(
                    f"certificate_file {certificate_file} and key_file {key_file}: no certificate (PEM) with its own "
                    f"key ({error})"
                ) from error
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(*self._files)


def fault(address: str, tls: Tls | None) -> str | None:
    """Why no TLS connection (or, without `tls`, no other) to host:port comes about; None where that is not the reason.

    gRPC says no more than that the socket was closed. At most a few seconds.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        plain = socket.create_connection((host, int(port)), _PROBE_SECONDS)
    except (OSError, ValueError):
        return None
    with plain:
        return _speaks_tls(plain) if tls is None else _refusal(plain, host, tls)


def _speaks_tls(plain: socket.socket) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is told to whoever it is
    try:
        context.wrap_socket(plain).close()
    except OSError:
        return None
    return "it speaks TLS and was asked without: give tls=True (--tls), or the CA of its certificate"


def _refusal(plain: socket.socket, host: str, tls: Tls) -> str | None:
    try:
        with tls.context("h2").wrap_socket(plain, server_hostname=host) as connection:
            return _of_ours(connection, tls)
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not accepted ({error.verify_message}): is ca_file the one that signed it?"
    except ssl.SSLEOFError:  # no word: a server that has no room, or a balancer that has no server
        return None
    except ssl.SSLError as error:
        if error.reason in _NO_TLS:
            return "it speaks no TLS, or another port was meant"
        return f"the TLS handshake failed ({error.reason})"
    except OSError:
        return None


def _of_ours(connection: ssl.SSLSocket, tls: Tls) -> str | None:
    """In TLS 1.3 a server looks at the client's certificate only after the client's part of the handshake is done."""
    shown = "the certificate that it was shown" if tls.shows else "a client without a certificate"
    try:
        connection.sendall(GREETING)
        if connection.recv(1):
            return None
    except TimeoutError:
        return None
    except ssl.SSLError as error:
        return f"it does not accept {shown} ({error.reason}); give certificate_file and key_file of one that it does"
    except OSError:
        pass
    return f"it ended the connection: it may not accept {shown}"
