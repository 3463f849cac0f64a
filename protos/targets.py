"""Who is to be scraped, told to Prometheus by a file in a folder that it watches (its file_sd_configs)."""

import errno
import fcntl
import json
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO
from urllib.parse import quote

_LONGEST = 128  # characters of a name in a file's name, which may have 255 bytes
_RANDOM_BYTES = 8


class Targets:
    """`with Targets(folder, name) as targets: targets.write(["host:port"])`: a file `NAME-RANDOM.json` meanwhile.

    The folder is made where it is missing. A name may have any characters: those that could lead out of the folder are
    written as %XX. A process that is killed leaves its file behind, and the next one of that name and folder removes
    it: one is known for dead by the lock that it does not hold. Raises OSError where the folder cannot be written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, _in_a_file_name(name)
        self._path = folder / f"{self._name}-{secrets.token_hex(_RANDOM_BYTES)}.json"
        self._file: TextIO | None = None  # its lock says that we live

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_predecessors()
            self.write([])
        except OSError as error:
            raise OSError(
                f"metrics_targets: {self._folder} cannot be written ({error.strerror}); give a folder that this user "
                "may write, and Prometheus read"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)
        if self._file is not None:
            self._file.close()

    def write(self, addresses: Sequence[str]) -> None:
        """From here on these host:port are scraped; whoever reads meanwhile finds the old ones or the new ones."""
        part = self._path.with_name(f".{self._path.name}.part")  # no *.json
        file = part.open("w")
        try:
            os.fchmod(file.fileno(), 0o644)  # whatever the umask: Prometheus is another user
            _locked(file)
            json.dump([{"targets": list(addresses), "labels": {}}], file)
            file.flush()
            part.replace(self._path)
        except BaseException:
            file.close()
            part.unlink(missing_ok=True)
            raise
        if self._file is not None:
            self._file.close()
        self._file = file

    def _remove_predecessors(self) -> None:
        ours = re.compile(re.escape(self._name) + f"-[0-9a-f]{{{2 * _RANDOM_BYTES}}}\\.json")
        for path in self._folder.iterdir():
            if ours.fullmatch(path.name):
                with suppress(FileNotFoundError, PermissionError), path.open("r+") as file:
                    # Its owner may have replaced it meanwhile, and lives.
                    if _locked(file) and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                        path.unlink()


def _in_a_file_name(name: str) -> str:
    quoted = quote(name, safe="")
    if len(quoted) <= _LONGEST:
        return quoted
    return f"{quoted[: _LONGEST - 17]}~{blake2b(name.encode(), digest_size=8).hexdigest()}"


def _locked(file: TextIO) -> bool:
    """Whether the file is ours from here on. File systems that know no locks hold nobody."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
