"""What stands on standard error: one line an event, JSON for machines and text where a terminal shows it.

    any logger -> root -> Flood (logs.py), in the thread that logs -> a bounded queue -> one thread that writes

Everybody's records go this way: ours, uvicorn's, gRPC's, asyncio's, OpenTelemetry's, and Python's warnings. Nobody who
logs waits for who reads: with a reader that has stopped, lines are left out and counted.
"""

import copy
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import QueueHandler
from queue import Empty, SimpleQueue
from typing import TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from teacher_server.logs import Flood
from teacher_server.trails import concerned

_WAITING_LINES = 10_000
_AT_ONCE = 100  # lines in one write
_LAST_LINES_SECONDS = 2.0
_PAUSE_SECONDS = 0.1  # that lines may wait; warnings and errors do not
_ATTRIBUTES = {*RESERVED_ATTRS, "message", "asctime"}
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code != ord("\t")}
# What they say of a start, a stop and a request, we say ourselves.
_QUIET = {"uvicorn": logging.WARNING}


@contextmanager
def logging_to(stream: TextIO) -> Iterator[None]:
    """All logging of this process, from INFO on, until left; then what was logged has been written."""
    root = logging.getLogger()
    before = root.level, {name: logging.getLogger(name).level for name in _QUIET}
    handler = _Written(stream, TextFormatter() if stream.isatty() else LineFormatter(), Flood())
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(before[0])
        for name, level in before[1].items():
            logging.getLogger(name).setLevel(level)
        handler.close()


class LineFormatter(JsonFormatter):
    """JSON: time (UTC, RFC 3339), level, logger, message, what the record carries besides, exc_info."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        super().__init__([*names, "message"], rename_fields=names)
        self.converter = time.gmtime


class TextFormatter(logging.Formatter):
    """The same for people; local time. What a caller has put into a message stays within its line, and moves no cursor;
    a traceback has its own lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        extra = [f"{name}={value}" for name, value in vars(record).items() if name not in _ATTRIBUTES]
        return " ".join([super().formatMessage(record), *extra]).translate(_CONTROLS)


class _Written(QueueHandler):
    """Formats and writes in a thread of its own."""

    queue: "SimpleQueue[logging.LogRecord]"

    def __init__(self, stream: TextIO, formatter: logging.Formatter, flood: Flood) -> None:
        super().__init__(SimpleQueue())
        self.addFilter(flood)
        self._flood = flood
        self._stream = stream
        self._lines = formatter  # not the handler's own, which QueueHandler would apply in the thread that logs
        self._left_out = 0
        self._closed = False
        self._hurry = threading.Event()
        # A daemon: a reader that has stopped cannot keep the process from ending.
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Lets go of whatever was logged: arguments may change, a traceback holds every frame's variables."""
        traces = [] if hasattr(record, "trace_id") or hasattr(record, "trace_ids") else concerned()
        if record.args or record.exc_info or traces:
            record = copy.copy(record)
            record.msg, record.args = record.getMessage(), None
            if record.exc_info:
                record.exc_text = record.exc_text or self._lines.formatException(record.exc_info)
                record.exc_info = None
            if len(traces) == 1:
                record.trace_id = traces[0]
            elif traces:
                record.trace_ids = traces
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._closed:
            return
        if self.queue.qsize() >= _WAITING_LINES:
            self._left_out += 1
            return
        self.queue.put_nowait(record)
        if record.levelno >= logging.WARNING:
            self._hurry.set()

    def close(self) -> None:
        """Waits until what was logged is written, a little while at most."""
        if not self._closed:
            self._closed = True
            self._hurry.set()
            self._thread.join(_LAST_LINES_SECONDS)
        super().close()

    def _write(self) -> None:
        last = False
        while not last:
            # Not woken by each line: this thread would hold the interpreter just when the reply is to be sent.
            self._hurry.wait(_PAUSE_SECONDS)
            self._hurry.clear()
            last = self._closed
            while records := self._next():
                self._put(records)
            records = self._flood.left_out(all_of_it=last)
            if self._left_out:
                left_out, self._left_out = self._left_out, 0
                records.append(_complaint(left_out))
            self._put(records)
            records = []  # while this thread waits, nothing is kept

    def _next(self) -> list[logging.LogRecord]:
        records: list[logging.LogRecord] = []
        with suppress(Empty):
            while len(records) < _AT_ONCE:
                records.append(self.queue.get_nowait())
        return records

    def _put(self, records: list[logging.LogRecord]) -> None:
        if records:
            with suppress(OSError, ValueError):  # nobody reads any more; there is nowhere to say so
                self._stream.write("".join(map(self._line, records)))
                self._stream.flush()

    def _line(self, record: logging.LogRecord) -> str:
        try:
            return f"{self._lines.format(record)}\n"
        except Exception as error:  # noqa: BLE001 - whatever was logged, the others are to be written
            return f"{self._lines.format(_broken(record, error))}\n"


def _complaint(lines: int) -> logging.LogRecord:
    said = f"{lines} lines left out: whoever reads them is slower than we write"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, said, None, None)


def _broken(record: logging.LogRecord, error: Exception) -> logging.LogRecord:
    said = f"a line of {record.pathname}:{record.lineno} cannot be written: {type(error).__name__}: {error}"
    return logging.LogRecord(record.name, logging.ERROR, __file__, 0, said, None, None)
