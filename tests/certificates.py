"""CAs and certificates of a test's own, as files."""

from datetime import UTC, datetime
from pathlib import Path

import trustme

PAST = {"not_before": datetime(2023, 1, 1, tzinfo=UTC), "not_after": datetime(2024, 1, 1, tzinfo=UTC)}


class Authority:
    """A CA, with its own certificate in `file`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name, self._ca = folder, name, trustme.CA()
        self.file = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(self.file)

    def issue(self, who: str, *, expired: bool = False, into: str = "") -> tuple[Path, Path]:
        """(certificate file, key file) of a server at a host, or of a student. `into`: the files' name."""
        certificate = self._ca.issue_cert(who, **(PAST if expired else {}))
        stem = into or f"{self._name}-{who}{'-expired' if expired else ''}"
        files = self._folder / f"{stem}.pem", self._folder / f"{stem}.key"
        files[0].write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(files[1])
        return files


def served_with(files: tuple[Path, Path], client_ca: Path | None = None) -> dict[str, object]:
    """The server's settings."""
    settings: dict[str, object] = dict(zip(("tls_certificate_file", "tls_key_file"), files, strict=True))
    return settings | ({"tls_client_ca_file": client_ca} if client_ca else {})


def showing(files: tuple[Path, Path]) -> dict[str, Path]:
    """A TeacherClient's arguments."""
    return dict(zip(("certificate_file", "key_file"), files, strict=True))
