"""The log of a job that runs elsewhere, shown here as it comes: whole lines, and a bar on a terminal."""

import re
import sys
from types import TracebackType
from typing import Self

from tqdm import tqdm

# As `train` says it where it has no terminal, whatever a cluster puts before it.
_EPOCH = re.compile(r": epoch (?P<epoch>\d+)/(?P<epochs>\d+), step \d+, .*accuracy (?P<accuracy>[\d.]+)")


class JobLog:
    """Lines go to standard output. The bar is of epochs, on standard error, and only where that is a terminal."""

    def __init__(self, job: str) -> None:
        self._bar = tqdm(desc=job, unit="epoch", disable=None, dynamic_ncols=True)
        self._begun = ""  # of a line whose end has not come
        self._read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._begun:
            self._show(f"{self._begun}\n")
        self._bar.close()

    def read(self, position: int, text: str) -> int:
        """Takes `text`, which begins `position` characters into the log, and returns where it ends.

        A log that is read again from its beginning, after a lost connection, is shown once.
        """
        end = position + len(text)
        new = text[self._read - position :] if position < self._read else text
        self._read = max(self._read, end)
        *lines, self._begun = (self._begun + new).split("\n")
        for line in lines:
            self._show(f"{line}\n")
        return end

    def _show(self, line: str) -> None:
        with tqdm.external_write_mode():
            sys.stdout.write(line)
            sys.stdout.flush()
        epoch = _EPOCH.search(line)
        if epoch:
            self._bar.total = int(epoch["epochs"])
            self._bar.set_postfix(accuracy=epoch["accuracy"], refresh=False)
            self._bar.n = int(epoch["epoch"])
            self._bar.refresh()
