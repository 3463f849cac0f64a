"""Spend on real replicas that are killed: nothing overspent, nothing lost, every forwarded sample accounted for."""

import asyncio
import random
import signal
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos import teacher_pb2 as pb
from protos import wire
from teacher_server import budgets
from teacher_server.accounts import snapshot
from teacher_server.store import Store
from tests.asking import asking, direct, pixels, stub_at
from tests.redis_servers import running
from tests.replicas import POINTS, Replica
from tests.serving import free_port, until


@contextmanager
def shared_ledger(folder):
    """A Redis for several replicas: (its server, its URL)."""
    port = free_port()
    folder.mkdir()
    options = ["--port", str(port), "--appendonly", "yes", "--appendfsync", "everysec"]
    with running(folder, *options) as redis:
        yield redis, f"redis://127.0.0.1:{port}"


def books(url):
    """The whole ledger at one moment."""

    async def read():
        async with Store(url, "ledger") as store:
            return await snapshot(store, everything=True)

    return asyncio.run(read())


def set_budget(url, job, limit):
    async def write():
        async with Store(url, "ledger") as store:
            await budgets.set_budget(store, "default", job, "samples", "total", limit=limit, who="test")

    asyncio.run(write())


def state_of(url, job):
    """(spent, held) of a job's budget."""
    whole = books(url)
    values = next(values for name, _, values in whole.keys if name == f"budget:default\t{job}\tsamples\ttotal")
    fields = dict(zip(values[::2], values[1::2], strict=True))
    return int(fields.get("spent:total", 0)), int(fields.get("held:total", 0))


def reason_of(error):
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.reason
    return error.code().name


class Spender(threading.Thread):
    """Asks of either replica until the budget is spent; cancels every tenth query."""

    def __init__(self, stubs, job, seed):
        super().__init__(daemon=True)
        self.stubs, self.job, self.draw = stubs, job, random.Random(seed)
        self.refused = 0
        self.error = None

    def run(self):
        try:
            while not self.refused:
                self.query(self.draw.randrange(1, 49))
        except BaseException as error:
            self.error = error

    def query(self, samples):
        x = pixels(samples, seed=self.draw.randrange(2**32))
        request = asking(x, request_id=f"{self.draw.random()}", cache_mode=pb.CACHE_MODE_BYPASS)
        cancel = self.draw.random() < 0.1
        while True:
            call = self.draw.choice(self.stubs).Label.future(
                request, metadata=[("preceptor-job", self.job)], timeout=20
            )
            if cancel:
                time.sleep(self.draw.random() / 50)
                call.cancel()
            try:
                reply = call.result()
            except grpc.FutureCancelledError:
                return
            except grpc.RpcError as error:
                match reason_of(error):
                    case "BUDGET_SPENT":
                        self.refused = samples
                        return
                    case "BUDGET_RESERVED" | "QUEUE_FULL" | "UNAVAILABLE" | "DRAINING" | "LEDGER_UNAVAILABLE":
                        time.sleep(0.05)
                        continue
                    case other:
                        raise AssertionError(f"{other}: {error.details()}") from error
            np.testing.assert_allclose(wire.decode_answers(reply.answers[0]), direct(x), rtol=1e-4, atol=1e-4)
            return


@pytest.mark.timeout(600)
def test_no_budget_is_overspent_however_many_race_and_whoever_is_killed(tmp_path):
    """64 clients, queries of 1 to 48 samples, two replicas of which one is killed in every round, every tenth query
    cancelled: nothing overspent, nothing reserved at rest, and less left than the smallest query refused."""
    draw = random.Random(0)
    with shared_ledger(tmp_path / "redis") as (_, url), ExitStack() as stack:
        doomed, steady = (Replica(tmp_path, name, url) for name in ("doomed", "steady"))
        stack.enter_context(steady.running())
        stubs = [stack.enter_context(stub_at(replica.address)) for replica in (doomed, steady)]
        victim = stack.enter_context(doomed.running())
        for number in range(20):
            job, limit = f"round-{number}", draw.randrange(1000, 4000)
            set_budget(url, job, limit)
            spenders = [Spender(stubs, job, 1000 * number + i) for i in range(64)]
            for spender in spenders:
                spender.start()
            until(lambda job=job, limit=limit: state_of(url, job)[0] > limit / 4)
            victim.kill()
            victim.wait()
            victim = stack.enter_context(doomed.running())  # settles what it left behind
            for spender in spenders:
                spender.join(60)
            assert [spender.error for spender in spenders if spender.error] == []
            until(lambda job=job: state_of(url, job)[1] == 0)
            spent, _ = state_of(url, job)
            assert 0 <= limit - spent < min(spender.refused for spender in spenders)
            assert books(url).verify()[1] == []


class Worker(threading.Thread):
    """One job that goes on until told to stop: shared views and fresh samples, retries and cancels."""

    def __init__(self, stubs, number, stop):
        super().__init__(daemon=True)
        self.stubs, self.stop, self.draw = stubs, stop, random.Random(number)
        self.job = f"job-{number}"
        self.answered = 0
        self.error = None

    def run(self):
        try:
            while not self.stop.is_set():
                self.query()
        except BaseException as error:
            self.error = error

    def query(self):
        fresh = self.draw.random() < 0.5
        x = pixels(self.draw.randrange(1, 100), seed=self.draw.randrange(2**32 if fresh else 30))
        mode = pb.CACHE_MODE_BYPASS if fresh else pb.CACHE_MODE_USE
        request = asking(x, request_id=f"{self.draw.random()}", cache_mode=mode)
        cancelled = self.draw.random() < 0.1
        for attempt in range(200):
            stub = self.draw.choice(self.stubs)
            call = stub.Label.future(request, metadata=[("preceptor-job", self.job)], timeout=20)
            if cancelled and not attempt:  # and asked again under the same id
                time.sleep(self.draw.random() / 50)
                call.cancel()
            try:
                reply = call.result()
            except (grpc.FutureCancelledError, CancelledError):
                continue
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
                    raise
                time.sleep(0.05)
                continue
            np.testing.assert_allclose(wire.decode_answers(reply.answers[0]), direct(x), rtol=1e-4, atol=1e-4)
            self.answered += len(x)
            return
        raise AssertionError("no answer in 200 attempts")


def until_all_go_on(workers):
    answered = [worker.answered for worker in workers]
    until(lambda: all(worker.answered > before for worker, before in zip(workers, answered, strict=True)))


@pytest.mark.timeout(300)
def test_every_forwarded_sample_is_charged_wasted_or_our_own(tmp_path):
    """Counted by the network itself, in a file: ten jobs with retries and cancels on two replicas, of which one is
    killed during a forward pass, between it and its booking, and between that and the reply; Redis is killed too."""
    stop = threading.Event()
    with shared_ledger(tmp_path / "redis") as (redis, url), ExitStack() as stack:
        doomed, steady = (Replica(tmp_path, name, url) for name in ("doomed", "steady"))
        survivor = stack.enter_context(steady.running())
        stubs = [stack.enter_context(stub_at(replica.address)) for replica in (doomed, steady)]
        workers = [Worker(stubs, number, stop) for number in range(10)]
        for worker in workers:
            worker.start()
        for point in POINTS:
            with doomed.running(point) as process:
                until_all_go_on(workers)  # then the kill comes with the next pass after the signal
                process.send_signal(signal.SIGUSR1)
                assert process.wait(60) == -signal.SIGKILL
            if point == "settle":
                redis.kill()
                until_all_go_on(workers)
                redis.start()
        with doomed.running() as process:
            until_all_go_on(workers)
            stop.set()
            for worker in workers:
                worker.join(60)
            assert [worker.error for worker in workers if worker.error] == []
            with ThreadPoolExecutor() as both:
                ended = both.map(lambda p: (p.terminate(), p.wait(60))[1], (process, survivor))
                assert list(ended) == [0, 0]
        whole = books(url)
        forwarded = sum(map(int, doomed.forwarded.read_text().split()))
        sums, problems = whole.verify()
        assert problems == []
        assert sums.startswith(f"forwarded {forwarded} = ")
        lines = {(line.tenant, line.job): line for line in whole.lines()}
        assert lines["_platform", "wasted/crash"].computed > 0
        assert lines["_platform", "own/warm-up"].computed == 5 * (64 + 1)  # two replicas, five starts
        for worker in workers:
            line = lines["default", worker.job]
            assert line.asked >= worker.answered  # its own count, and replies that were lost
            assert line.cached > 0
