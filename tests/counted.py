"""A teacher that counts what it forwards, and whose process can be told to end during a forward pass."""

import os
import signal
import threading

from torch import Tensor, nn

from tests.teachers import tiny

FORWARDED = "FORWARDED_SAMPLES_FILE"


class _Killer:
    def __init__(self) -> None:
        self.point = ""
        self.armed = False
        self._beginning = threading.Lock()

    def begins(self) -> None:
        """A pass is about to be noted; until the network has it, and has counted it, nobody is killed elsewhere."""
        self._beginning.acquire()

    def has_begun(self) -> None:
        if self._beginning.locked():
            self._beginning.release()

    def at(self, point: str) -> None:
        if self.armed and point == self.point:
            if point != "forward":
                self._beginning.acquire()
            os.kill(os.getpid(), signal.SIGKILL)


KILLER = _Killer()


class Counted(nn.Module):
    """Answers as `tiny` does; appends the size of every batch to a file, independently of all else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()

    def forward(self, x: Tensor) -> Tensor:
        if FORWARDED in os.environ:
            file = os.open(os.environ[FORWARDED], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, b"%d\n" % len(x))
            os.close(file)
        KILLER.has_begun()
        KILLER.at("forward")
        return self.net(x)
