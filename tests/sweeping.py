"""Students for the tests of sweeps, made in trials' own processes: "tests.sweeping:together"."""

import os
import signal
import time
from pathlib import Path

from torch import Tensor, nn

from student_worker.models import build


def together(*, channels: int, classes: int, size: int, inner: str, folder: str, of: int) -> nn.Module:
    """The student called `inner`, once so many trials have come to make theirs: a race has a starting line."""
    (Path(folder) / str(os.getpid())).touch()
    end = time.monotonic() + 120
    while len(list(Path(folder).iterdir())) < of:
        if time.monotonic() > end:
            raise TimeoutError(f"{of} trials did not come together")
        time.sleep(0.01)
    return build(inner, channels=channels, classes=classes, size=size)


class Killed(nn.Module):
    """Kills its process at the so manieth forward pass in train mode, unless `marker` says that it has happened."""

    def __init__(self, *, channels: int, classes: int, size: int, marker: str, at: int) -> None:
        super().__init__()
        self.net = build("cnn-tiny", channels=channels, classes=classes, size=size)
        self._marker, self._left = Path(marker), at

    def forward(self, x: Tensor) -> Tensor:
        self._left -= self.training
        if self._left == 0 and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        logits: Tensor = self.net(x)
        return logits
