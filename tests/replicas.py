"""Replicas of one ledger in processes of their own, which count what they forward and end themselves when told to.

python -m tests.replicas POINT serve ...    `teacher-server serve`, that SIGUSR1 has killed by SIGKILL at POINT
"""

import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from teacher_server.__main__ import main as serve
from teacher_server.journal import Journal
from teacher_server.ledger import Ledger
from tests.counted import FORWARDED, KILLER, Counted
from tests.serving import arguments, free_port, process
from tests.teachers import TINY, save

POINTS = ("forward", "settle", "reply")


class Replica:
    """One of several; `start` and `kill` as often as you like."""

    def __init__(self, folder: Path, name: str, url: str, **settings: object) -> None:
        weights = save(Counted(), folder / f"{name}.safetensors", TINY)
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.forwarded = folder / "forwarded"
        self._settings = arguments(folder) | {
            "model": "tests.counted:Counted",
            "weights": weights,
            "grpc_port": self.port,
            "state_directory": folder / name,
            "ledger_redis_url": url,
            "lease_seconds": 1,
            **settings,
        }

    @contextmanager
    def running(self, point: str = ""):
        """The process, ready; killed when left."""
        environment = os.environ | {FORWARDED: str(self.forwarded)}
        with process("tests.replicas", point or "none", environment=environment, **self._settings) as (server, _, _):
            yield server


def main() -> int:
    KILLER.point = sys.argv[1]
    signal.signal(signal.SIGUSR1, lambda *_: setattr(KILLER, "armed", True))
    book, answered, forwarding = Ledger.book, Ledger.answered, Journal.forwarding

    def began(*args):
        if threading.current_thread().name != "engine":  # warming up
            return forwarding(*args)
        KILLER.begins()
        try:
            return forwarding(*args)
        except BaseException:
            KILLER.has_begun()
            raise

    def booked(*args, **kwargs):
        KILLER.at("settle")
        book(*args, **kwargs)

    def replied(*args, **kwargs):
        answered(*args, **kwargs)
        KILLER.at("reply")

    Ledger.book, Ledger.answered, Journal.forwarding = booked, replied, began
    return serve(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
