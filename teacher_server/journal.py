"""What this replica has computed and not yet seen on Redis's disk: a local file, written ahead.

    forwarding(n)  -> "a forward pass of n samples begins", before it does, from the batcher's thread
    record(lines)  -> what became of it and who is charged, as soon as that is known
    posted(k)      -> all records so far belong to posting k or an earlier one
    forget(k)      -> Redis has the postings up to k on its disk

A record is one line with a checksum, appended by one write(2): what was written survives the end of the process however
it comes. It is not synced to the disk: a machine that loses its power loses its last seconds here, as Redis does.
What a process left behind is read by `left_behind`; passes that began and have no outcome were wasted.
"""

import errno
import json
import os
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from teacher_server.errors import LedgerUnavailable

_SEGMENT_BYTES = 8 * 2**20
Record = dict[str, Any]
"""What happened to one batch or query, as `ledger.py` understands it."""


class Journal:
    """One run of one replica, an *epoch*. `forwarding` is for any thread, the rest for one."""

    def __init__(self, directory: Path, epoch: str, header: dict[str, Any]) -> None:
        """Raises OSError where nothing can be written."""
        self.epoch = epoch
        self._directory = directory
        self._header = header
        self._lock = threading.Lock()
        self._number = 0
        self._open: dict[int, int] = {}  # passes under way: their samples
        self._late: deque[dict[str, Any]] = deque()  # what did happen, and the disk has not taken
        self._segment = -1
        self._written = 0
        self._torn = False
        self._posted = 0
        self._old: list[tuple[Path, int]] = []  # full segments, and the last posting in each
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._begin_segment()
        except OSError as error:
            raise OSError(
                f"state_directory: the journal cannot be written in {directory} ({error.strerror}); make room there, "
                "or give another --state-directory"
            ) from None

    def close(self) -> None:
        os.close(self._file)

    def forwarding(self, samples: int) -> int:
        """Notes that a forward pass of so many samples begins; returns its number.

        Raises LedgerUnavailable where that cannot be written: what cannot be accounted for is not computed.
        """
        with self._lock:
            self._number += 1
            self._append({"forward": self._number, "samples": samples})
            self._open[self._number] = samples
            return self._number

    def record(self, record: Record, number: int | None = None) -> None:
        """Notes an outcome; with a number, that of the forward pass of this number.

        Raises LedgerUnavailable where that cannot be written: it will be before anything else is.
        """
        with self._lock:
            self._late.append({"record": record} if number is None else {"record": record, "of": number})
            self._catch_up()

    def posted(self, posting: int) -> None:
        """Notes that all records so far belong to this posting or an earlier one."""
        with self._lock:
            self._append({"posting": posting})
            self._posted = posting
            if self._written > _SEGMENT_BYTES:
                full, path = self._file, self._path(self._segment)
                with suppress(OSError):  # the next posting tries again
                    self._begin_segment()
                    self._old.append((path, posting))
                    os.close(full)

    def forget(self, posting: int) -> None:
        """Drops the files of which Redis has everything."""
        while self._old and self._old[0][1] <= posting:
            self._old.pop(0)[0].unlink(missing_ok=True)

    def _path(self, segment: int) -> Path:
        return self._directory / f"{self.epoch}.{segment:06}"

    def _begin_segment(self) -> None:
        """Raises OSError where that cannot be done; all is then as it was."""
        passes = [{"forward": number, "samples": samples} for number, samples in self._open.items()]
        header = {"epoch": self.epoch, "posted": self._posted, **self._header}
        data = b"".join(map(_line, (header, *passes)))
        path = self._path(self._segment + 1)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with ExitStack() as undo:
            undo.callback(path.unlink)
            undo.callback(os.close, file)
            if os.write(file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            undo.pop_all()
        self._file, self._torn, self._written = file, False, len(data)
        self._segment += 1

    def _append(self, entry: dict[str, Any]) -> None:
        self._catch_up()
        self._write(entry)

    def _catch_up(self) -> None:
        while self._late:
            self._write(self._late[0])
            self._open.pop(self._late.popleft().get("of", 0), None)

    def _write(self, entry: dict[str, Any]) -> None:
        # Of a torn line that lacks its end alone, too, the checksum fits no more.
        line = (b"?\n" if self._torn else b"") + _line(entry)
        try:
            self._torn = True  # until it is known to be whole
            self._torn = os.write(self._file, line) < len(line)
            problem: object = "the disk took only a part"
        except OSError as error:
            problem = error
        if self._torn:
            raise LedgerUnavailable(
                f"the journal cannot be written ({self._path(self._segment)}: {problem}), and what cannot be accounted "
                "for is not computed; ask another replica"
            )
        self._written += len(line)


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


class LeftBehind(NamedTuple):
    """An epoch whose process has ended."""

    epoch: str
    header: dict[str, Any]
    postings: dict[int, list[Record]]
    """By their number, the last one those records that no posting had taken yet."""
    wasted: int
    """Samples of forward passes that began and have no outcome."""
    paths: list[Path]


def left_behind(directory: Path) -> Iterator[LeftBehind]:
    """Every epoch in the directory; none of them may be running."""
    epochs: dict[str, list[Path]] = {}
    for path in sorted(directory.glob("*.??????")):
        epochs.setdefault(path.stem, []).append(path)
    for epoch, paths in epochs.items():
        header: dict[str, Any] = {}
        postings: dict[int, list[Record]] = {}
        waiting: list[Record] = []
        open_passes: dict[int, int] = {}
        posted = 0
        for path in paths:
            for entry in _entries(path):
                if "epoch" in entry:
                    header = entry
                    posted = max(posted, entry["posted"])
                elif "forward" in entry:
                    open_passes[entry["forward"]] = entry["samples"]
                elif "record" in entry:
                    waiting.append(entry["record"])
                    open_passes.pop(entry.get("of", 0), None)
                elif "posting" in entry:
                    posted = entry["posting"]
                    postings[posted], waiting = waiting, []
        postings[posted + 1] = waiting
        if not header:  # it ended before it wrote anything
            for path in paths:
                path.unlink(missing_ok=True)
            continue
        yield LeftBehind(epoch, header, postings, sum(open_passes.values()), paths)


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """Its whole lines. One that is torn was never relied upon: whoever wrote it got an error, or was no more."""
    for line in path.read_bytes().splitlines():
        checksum, _, text = line.partition(b" ")
        if text and checksum == b"%08x" % zlib.crc32(text):
            yield json.loads(text)
