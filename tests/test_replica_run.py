"""A run over replicas that are stopped, cut off and added: no failed step, no wrong answer, nothing charged twice."""

import hashlib
import logging
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import nn

from protos import teacher_pb2 as pb
from student_worker import TeacherClient, Unix
from tests.asking import direct, metric
from tests.redis_servers import AOF, running
from tests.serving import arguments, process, until

needs_namespaces = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace takes root; run as root")
STUDENT, VIEWER = "red", "eye"  # tokens
STEP_SAMPLES = 48


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


class Namespace:
    """A network of its own with one wire to this one, which can be cut and mended."""

    def __init__(self):
        number = os.getpid()
        self.name, self._outside, self._inside = f"preceptor-{number}", f"pre{number}o", f"pre{number}i"
        self._near, self.host = (f"198.18.{number % 256}.{end}" for end in (1, 2))  # RFC 2544: nobody's

    def __enter__(self):
        ip("netns", "add", self.name)
        try:
            ip("link", "add", self._outside, "type", "veth", "peer", "name", self._inside, "netns", self.name)
            ip("addr", "add", f"{self._near}/30", "dev", self._outside)
            ip("link", "set", self._outside, "up")
            ip("-n", self.name, "addr", "add", f"{self.host}/30", "dev", self._inside)
            self.mend()
        except BaseException:
            ip("netns", "del", self.name)
            raise
        return self

    def __exit__(self, *_):
        ip("netns", "del", self.name)  # and the wire with it

    def cut(self):
        """Nothing comes through any more, and nobody is told."""
        ip("-n", self.name, "link", "set", self._inside, "down")

    def mend(self):
        ip("-n", self.name, "link", "set", self._inside, "up")


class Checking:
    """A teacher whose answers are compared with the network's own."""

    def __init__(self, client):
        self._client = client

    def label(self, x, **how):
        answer = self._client.label(x, **how)
        np.testing.assert_allclose(answer.logits.numpy(), direct(x.numpy()), rtol=1e-4, atol=1e-4)
        return answer


class Run(threading.Thread):
    """Trains at depth 1 until it is told to stop; `error` is what ended it before."""

    def __init__(self, client):
        super().__init__(daemon=True)
        self.unix = Unix(Checking(client), to_student=torch.Tensor.float)
        self.stop = threading.Event()
        self.error = None
        self.slowest = 0.0

    def run(self):
        student = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)
        began = time.monotonic()
        try:
            for b in self.unix.batches(self._batches(), student, depth=1):
                self.unix.criterion(student(b.x / 255), b).backward()
                optimizer.step()
                optimizer.zero_grad()
                self.slowest, began = max(self.slowest, time.monotonic() - began), time.monotonic()
        except BaseException as error:
            self.error = error

    def _batches(self):
        generator = torch.Generator().manual_seed(0)
        while not self.stop.is_set():
            yield torch.randint(0, 256, (64, 3, 8, 8), generator=generator, dtype=torch.uint8)

    def goes_on(self, steps=30):
        """That many more steps; how long the slowest took."""
        self.slowest, end = 0.0, self.unix.steps + steps
        until(lambda: self.unix.steps >= end or self.error)
        assert self.error is None, repr(self.error)
        return self.slowest


@contextmanager
def replicas_of(folder):
    """A function that starts a replica of one ledger and cache: its process, with its http_address, and its address."""
    lines = [
        f"{hashlib.sha256(token.encode()).hexdigest()} {what}"
        for token, what in ((STUDENT, "red"), (VIEWER, "x viewer"))
    ]
    (folder / "tokens").write_text("\n".join(lines))
    with ExitStack() as stack:
        redis = Path(stack.enter_context(TemporaryDirectory()))  # its socket's path is short, and of every network
        stack.enter_context(running(redis, *AOF))
        settings = arguments(folder) | {"tokens_file": folder / "tokens"}
        settings |= dict.fromkeys(("cache_redis_url", "ledger_redis_url"), f"unix://{redis}/redis.sock")

        def start(**more):
            server, address, http = stack.enter_context(process(**settings | more))
            server.http_address = http
            return server, address

        yield start


def asked(server):
    """Samples of the run that this replica took."""
    return metric(server, "preceptor_asked_samples_total", token=VIEWER, job="run")


def pending(server):
    """Samples whose charge is not in the ledger yet."""
    return metric(server, "preceptor_ledger_pending_samples", token=VIEWER)


def takes_samples(server):
    before = asked(server)
    until(lambda: asked(server) >= before + 5 * STEP_SAMPLES)


@needs_namespaces
@pytest.mark.timeout(300)
def test_a_run_outlives_replicas_that_stop_and_are_cut_off_and_takes_up_new_ones(tmp_path):
    with replicas_of(tmp_path) as start, Namespace() as place, ExitStack() as stack:
        there = {"within": ("ip", "netns", "exec", place.name), "host": place.host}
        with ThreadPoolExecutor() as both:
            (first, address), (second, _) = both.map(lambda more: start(**more), ({}, there))
        client = stack.enter_context(TeacherClient(address, job="run", token=STUDENT))
        run = Run(client)
        run.start()
        takes_samples(second)

        first.send_signal(signal.SIGSTOP)
        pause = {"stopped": run.goes_on()}
        first.send_signal(signal.SIGCONT)
        takes_samples(first)

        place.cut()
        pause["cut off"] = run.goes_on()

        third, _ = start()
        began, before, all_before = time.monotonic(), asked(third), run.unix.asked
        until(lambda: asked(third) - before >= 0.4 * (run.unix.asked - all_before) > 40 * STEP_SAMPLES)
        seconds = time.monotonic() - began
        share = (asked(third) - before) / (run.unix.asked - all_before)
        assert seconds < 30

        place.mend()
        takes_samples(second)
        run.stop.set()
        run.join(60)
        assert run.error is None

        for server in (first, second, third):
            until(lambda server=server: pending(server) == 0)
        lines = client._call("Spend", pb.SpendRequest(job="run")).lines
        assert sum(line.computed for line in lines) == run.unix.asked
        assert max(pause.values()) < 10
        logging.getLogger(__name__).info(
            "%d steps, %d samples, slowest step %s (s), the one added took %.0f %% of the samples after %.1f s",
            run.unix.steps,
            run.unix.asked,
            pause,
            100 * share,
            seconds,
        )
