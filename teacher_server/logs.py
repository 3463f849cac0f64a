"""What the log takes: so many lines a second, each on one line, so that nobody can flood it or forge its lines."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TextIO

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127) if code != ord("\t")}


class RateLimit(logging.Filter):
    """Lets `burst` records of each logger and level pass, and then `per_second` of them; drops the rest.

    A record that passes has an attribute `left_out`: how many were dropped since the last one that passed, whichever
    logger's they were. So no logger silences another, and the count is told as soon as anything is. For handlers, which
    see the records of all loggers below theirs.
    """

    def __init__(
        self, per_second: float = 10.0, burst: int = 100, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._lock = threading.Lock()
        self._left: dict[tuple[str, int], tuple[float, float]] = {}  # how many may pass, as of when
        self._dropped = 0

    def filter(self, record: logging.LogRecord) -> bool:
        with self._lock:
            now = self._clock()
            left, then = self._left.get((record.name, record.levelno), (self._burst, now))
            left = min(self._burst, left + (now - then) * self._per_second)
            passes = left >= 1
            self._left[record.name, record.levelno] = (left - passes, now)
            if not passes:
                self._dropped += 1
                return False
            record.left_out, self._dropped = self._dropped, 0
            return True


class OneLine(logging.Formatter):
    """As text. What a caller has put into a message stays within its line; a traceback may have its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = record.message.translate(_CONTROLS)
        left_out = getattr(record, "left_out", 0)
        return super().formatMessage(record) + (
            f" ({left_out} lines before this one were left out)" if left_out else ""
        )


def configure(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """The log of this process: to `stream`, or to standard error."""
    handler = logging.StreamHandler(stream)
    handler.addFilter(RateLimit())
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
