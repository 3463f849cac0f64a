"""Files that are read anew when they change, while the server runs: tokens and certificates."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

_log = logging.getLogger(__name__)
_Content = TypeVar("_Content")
_Stamp = tuple[int, ...] | None  # None: no such file


class Reloaded(Generic[_Content]):
    """What `read()` makes of some files; each call costs one stat a file, and reads again only what has changed.

    What cannot be read any more leaves in force what was read before; that is logged, once for each change, and
    `failed` is told True, and False when it could be read again. Raises what `read` raises when made: OSError, or
    ValueError for what is malformed. Thread-safe.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], _Content], failed: Callable[[bool], object] = lambda _: None
    ) -> None:
        self._paths, self._read, self._failed = paths, read, failed
        self._lock = threading.Lock()
        self._stamps = self._now()
        self._content = read()

    def __call__(self) -> _Content:
        stamps = self._now()
        if stamps != self._stamps:
            with self._lock:
                if stamps != self._stamps:
                    self._reload(stamps)
        return self._content

    def _now(self) -> tuple[_Stamp, ...]:
        return tuple(map(_stamp, self._paths))

    def _reload(self, stamps: tuple[_Stamp, ...]) -> None:
        names = " and ".join(map(str, self._paths))
        try:
            content = self._read()
        except (OSError, ValueError) as error:
            _log.error("%s: not reloaded, what was read before stays in force (%s)", names, error)
            self._failed(True)
        else:
            if self._now() != stamps:
                return  # written to meanwhile: the next call reads it again
            self._content = content
            self._failed(False)
            _log.info("%s: reloaded", names)
        self._stamps = stamps


def _stamp(path: Path) -> _Stamp:
    try:
        seen = os.stat(path)  # noqa: PTH116 - on the way of every query: Path.stat() takes twice as long
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_ctime_ns, seen.st_size, seen.st_ino
