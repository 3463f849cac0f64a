"""Floods of lines: of a kind that comes too often the first few are written, and the rest is counted."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_LINES = 50
_SECONDS = 10.0
_CHARACTERS = 200
_KINDS = 200  # at a time; who makes up kinds of lines fills the last of them, and no memory


@dataclass(eq=False)
class _Kind:
    sample: logging.LogRecord
    until: float
    lines: int = 0
    left_out: int = 0


class Flood(logging.Filter):
    """Lets 50 lines of a kind through in 10 s. A kind is a logger's message before its arguments are put in, and with
    an access line its code and tenant; lines of calls that went well are all let through.

    Give it to a handler, and write what `left_out` gives now and then. For any thread.
    """

    def __init__(
        self, lines: int = _LINES, seconds: float = _SECONDS, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._lines, self._seconds, self._clock = lines, seconds, clock
        self._kinds: dict[object, _Kind] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        code = getattr(record, "code", None)
        if code == "OK" or (isinstance(code, int) and 100 <= code < 400):
            return True
        key: object = (record.name, record.levelno, _message(record), code, getattr(record, "tenant", None))
        with self._lock:
            now = self._clock()
            if len(self._kinds) >= _KINDS and key not in self._kinds:
                self._drop_old(now)
                if len(self._kinds) >= _KINDS:
                    key = None
            kind = self._kinds.get(key)
            if kind is None or (kind.until <= now and not kind.left_out):
                kind = self._kinds[key] = _Kind(_bare(record), now + self._seconds)
            kind.lines += 1
            if kind.lines <= self._lines:
                return True
            kind.left_out += 1
            return False

    def left_out(self, *, all_of_it: bool = False) -> list[logging.LogRecord]:
        """A line for each kind that had too many, once its time is over, or now for `all_of_it`."""
        said = []
        with self._lock:
            now = self._clock()
            for key, kind in list(self._kinds.items()):
                if kind.left_out and (all_of_it or kind.until <= now):
                    said.append(_summary(kind, many_kinds=key is None))
                    del self._kinds[key]
        return said

    def _drop_old(self, now: float) -> None:
        for key, kind in list(self._kinds.items()):
            if kind.until <= now and not kind.left_out:
                del self._kinds[key]


def _message(record: logging.LogRecord) -> str:
    """Without its arguments. It may be any object, an exception too, which is not to be kept."""
    return str(record.msg)[:_CHARACTERS]


def _bare(record: logging.LogRecord) -> logging.LogRecord:
    """What names its kind, and nothing that was logged."""
    bare = logging.LogRecord(record.name, record.levelno, record.pathname, record.lineno, _message(record), None, None)
    for name in ("code", "tenant"):
        if hasattr(record, name):
            setattr(bare, name, getattr(record, name))
    return bare


def _summary(kind: _Kind, *, many_kinds: bool) -> logging.LogRecord:
    record = _bare(kind.sample)
    like = "of many kinds" if many_kinds else f"like this: {kind.sample.msg}"
    record.msg = f"{kind.left_out} more lines left out, {like}"
    record.__dict__["left_out"] = kind.left_out
    return record
