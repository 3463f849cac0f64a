"""A teacher that counts what it forwards, and whose process can be told to end during a forward pass."""

import os
import signal

from torch import Tensor, nn

from tests.teachers import tiny

FORWARDED = "FORWARDED_SAMPLES_FILE"


class _Killer:
    def __init__(self) -> None:
        self.point = ""
        self.armed = False

    def at(self, point: str) -> None:
        if self.armed and point == self.point:
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
        KILLER.at("forward")
        return self.net(x)
