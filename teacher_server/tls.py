"""TLS on both ports: the server's certificate, and the CAs of those that clients must show. Files may change."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from teacher_server.config import TlsConfig
from teacher_server.reloading import Reloaded


@dataclass(frozen=True)
class _Material:
    chain: bytes
    key: bytes
    client_cas: bytes | None
    context: ssl.SSLContext
    """Of the three, for HTTP."""


class Certificates:
    """Every handshake takes the files as they are; what cannot be read, or does not fit, leaves the last in force.

    Raises OSError, or ValueError for files that hold no certificate, or a key that is another's.
    """

    def __init__(
        self,
        certificate: Path,
        key: Path,
        client_ca: Path | None = None,
        stale: Callable[[bool], object] = lambda _: None,
    ) -> None:
        """`stale` is told of each change whether it could not be read. With `client_ca` clients must show one."""
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        paths = [certificate, key, *([client_ca] if client_ca else [])]
        self._material = Reloaded(paths, self._read, stale)

    @classmethod
    def of(cls, config: TlsConfig, stale: Callable[[bool], object]) -> "Certificates | None":
        """None where there is no certificate. Raises as the class does."""
        if config.tls_certificate_file is None or config.tls_key_file is None:
            return None
        return cls(config.tls_certificate_file, config.tls_key_file, config.tls_client_ca_file, stale)

    def for_grpc(self) -> grpc.ServerCredentials:
        """gRPC itself takes TLS 1.2 and 1.3."""
        served = self._material()

        def changed() -> Any:  # called at every handshake, by a thread of gRPC's
            nonlocal served
            # A client that must show a certificate gets a configuration of its own, or gRPC would take up its session
            # again, which shows none.
            if (material := self._material()) is served and self._client_ca is None:
                return None
            served = material
            return _configuration(material)

        return grpc.dynamic_ssl_server_credentials(_configuration(served), changed, self._client_ca is not None)

    def for_http(self) -> ssl.SSLContext:
        """Hands every handshake to the context of the files as they are."""
        first = self._material()

        def switch(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
            material = self._material()
            if material is not first:
                connection.context = material.context

        # OpenSSL calls it whether or not the client names a server.
        first.context.sni_callback = switch
        return first.context

    def _read(self) -> _Material:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        # A resumed session shows no certificate, so one could outlive its CA.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        try:
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
        except ssl.SSLError as error:
            raise ValueError(
                f"tls_certificate_file {self._certificate} and tls_key_file {self._key}: no certificate (PEM, the "
                f"server's own first) with its own key ({error})"
            ) from error
        if self._client_ca is not None:
            try:
                context.load_verify_locations(self._client_ca)
            except ssl.SSLError as error:
                raise ValueError(
                    f"tls_client_ca_file: {self._client_ca} holds no certificate (PEM; {error})"
                ) from error
            context.verify_mode = ssl.CERT_REQUIRED
            context.minimum_version = ssl.TLSVersion.TLSv1_3  # of 1.2 OpenSSL takes sessions up even without tickets
        client_cas = self._client_ca.read_bytes() if self._client_ca else None
        return _Material(self._certificate.read_bytes(), self._key.read_bytes(), client_cas, context)


def _configuration(material: _Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key, material.chain)], material.client_cas)


def _no_password() -> str:
    """Or OpenSSL would ask for one on the terminal."""
    raise ValueError("tls_key_file: the key is encrypted; give one that is not, readable by this process alone")
