"""One teacher, one cache, one ledger, several students: through the real client and the real server."""

import threading

import grpc
import numpy as np
import pytest
import torch
from torch import nn

from protos import teacher_pb2 as pb
from protos import wire
from student_worker import TeacherClient, Unix
from student_worker.errors import BudgetSpent
from tests.asking import asking, direct, metric, pixels, put, refusal, stub_at
from tests.redis_servers import running
from tests.serving import GATE, Gated, arguments, free_port, serving, until


def spend(stub, job):
    """The job's line in the ledger."""
    (line,) = stub.Spend(pb.SpendRequest(job=job), metadata=[("preceptor-job", job)]).lines
    return line


def student():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


def views(items, seed):
    """All items in an order of the student's own, (x, None, index)."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    for places in order.split(48):
        yield items[places], torch.full((len(places),), -1), places


def distil(server, job, items, seed):
    """(Unix, each item's answer, where the answers came from)."""
    answers, sources = {}, []
    with TeacherClient(server.grpc_address, job=job) as teacher:
        unix = Unix(teacher, keep=1.0, mixing="none", strategy="random", to_student=lambda x: x.float() / 255)
        for b in unix.batches(views(items, seed), student()):
            answers |= {int(i): row.numpy().tobytes() for i, row in zip(b.index, b.answer, strict=True)}
            sources += b.source
    return answers, sources


def test_two_students_of_the_same_views_have_each_answer_computed_once(server, stub):
    items = torch.from_numpy(pixels(400, seed=99))
    first, sources = distil(server, "first", items, seed=1)
    assert sources == ["computed"] * 400
    second, sources = distil(server, "second", items, seed=2)
    assert sources == ["cached"] * 400
    assert first == second, "the same bits"
    assert metric(server, "preceptor_samples_total", job="second", source="computed") == 0
    assert (spend(stub, "first").computed, spend(stub, "first").asked) == (400, 400)
    assert (spend(stub, "second").computed, spend(stub, "second").cached) == (0, 400)


def test_of_32_identical_queries_one_is_computed_and_one_charged(tmp_path):
    with serving(**arguments(tmp_path, "gated")) as server, stub_at(server.grpc_address) as stub:
        x, job = pixels(40, seed=5), [("preceptor-job", "same")]
        before = len(Gated.batches)
        with GATE.shut():
            blocker = stub.Label.future(asking(pixels(1)))  # holds the device, so that the rest waits its turn
            assert GATE.reached.acquire(timeout=10)
            calls = [stub.Label.future(asking(x, pb.CACHE_MODE_USE), metadata=job)]
            until(lambda: metric(server, "preceptor_queue_samples", job="same") == 40)
            calls += [stub.Label.future(asking(x, pb.CACHE_MODE_USE), metadata=job) for _ in range(31)]
            until(lambda: metric(server, "preceptor_asked_samples_total", job="same") == 32 * 40)
            calls[0].cancel()
            until(lambda: metric(server, "preceptor_requests_total", call="Label", code="CANCELLED") == 1)
        blocker.result(30)
        for call in calls[1:]:
            np.testing.assert_allclose(wire.decode_answers(call.result(30).answers[0]), direct(x), rtol=1e-4, atol=1e-4)
        assert Gated.batches[before:] == [1, 40]
        assert sum(call.result().cost.samples for call in calls[1:]) == 40
        line = spend(stub, "same")
        assert (line.computed, line.coalesced, line.asked) == (40, 30 * 40, 31 * 40)


def test_a_query_retried_a_hundred_times_is_charged_once(server, stub):
    job = [("preceptor-job", "retrying")]
    request = asking(pixels(7, seed=6), request_id="again")
    costs = [stub.Label(request, metadata=job).cost.samples for _ in range(100)]
    assert costs == [7] + [0] * 99
    assert spend(stub, "retrying").computed == 7
    code, details, _, _ = refusal(stub.Label, asking(pixels(7, seed=7), request_id="again"), metadata=job)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "request_id: 'again'" in details


def test_a_budget_ends_a_job_and_answers_say_what_is_left(server):
    put(server, "/v1/budgets/default/jobs/poor", unit="samples", limit=100)
    with TeacherClient(server.grpc_address, job="poor") as teacher:
        (budget,) = teacher.label(pixels(60, seed=8), cache_mode="bypass").budgets
        assert (budget.left, budget.limit, budget.name) == (40, 100, "poor")
        with pytest.raises(BudgetSpent, match=r"job 'poor' of tenant 'default'.* 40 samples are left"):
            teacher.label(pixels(41, seed=9), cache_mode="bypass")
        again = teacher.label(pixels(40, seed=10))
        assert again.budgets[0].left == 0
        assert set(teacher.label(pixels(40, seed=10)).sources) == {"cached"}, "what is cached is free"
        with pytest.raises(BudgetSpent):
            teacher.label(pixels(1, seed=11))


def test_look_up_first_uploads_only_the_misses(server):
    with TeacherClient(server.grpc_address, job="looking", cache_namespace="looking") as teacher:
        x = pixels(50, seed=12)
        assert not teacher.lookup(x).found.any()
        teacher.label(x[::2])
        known = teacher.lookup(x)
        assert known.found.tolist() == [i % 2 == 0 for i in range(50)]
        answer = teacher.label(x, look_up_first=True)
        np.testing.assert_allclose(answer.logits.numpy(), direct(x), rtol=1e-4, atol=1e-4)
        assert answer.sources == ("cached", "computed") * 25
        assert answer.cost.samples == 25
    with TeacherClient(server.grpc_address, job="elsewhere") as teacher:
        assert not teacher.lookup(x).found.any(), "a namespace is found under its name only"


class Job(threading.Thread):
    """Asks about fresh samples until it has asked about so many, or its budget is spent."""

    def __init__(self, address, job, samples):
        super().__init__(daemon=True)
        self.address, self.job, self.samples = address, job, samples
        self.answered, self.spent, self.error = 0, False, None

    def run(self):
        try:
            with TeacherClient(self.address, job=self.job, timeout=60) as teacher:
                seed = 0
                while self.answered < self.samples:
                    x = pixels(10, seed=hash((self.job, seed)) % 2**32)
                    seed += 1
                    answer = teacher.label(x, request_id=f"{seed}")
                    np.testing.assert_allclose(answer.logits.numpy(), direct(x), rtol=1e-4, atol=1e-4)
                    self.answered += 10
        except BudgetSpent:
            self.spent = True
        except BaseException as error:
            self.error = error


def test_redis_stops_and_comes_back_while_students_train(tmp_path):
    """Cache and ledger both: a job without a budget goes on meanwhile, one with a budget is not overspent."""
    port = free_port()
    with running(tmp_path, "--port", str(port), "--appendonly", "yes") as redis:
        url = f"redis://127.0.0.1:{port}"
        settings = arguments(tmp_path) | {"ledger_redis_url": url, "cache_redis_url": url, "lease_seconds": 2}
        with serving(**settings) as server, stub_at(server.grpc_address) as stub:
            put(server, "/v1/budgets/default/jobs/bounded", unit="samples", limit=2000)
            jobs = [Job(server.grpc_address, "free", 3000), Job(server.grpc_address, "bounded", 10_000)]
            for job in jobs:
                job.start()
            until(lambda: jobs[1].answered > 200)
            redis.kill()
            answered = jobs[0].answered
            until(lambda: jobs[0].answered > answered + 200)  # without Redis
            redis.start()
            for job in jobs:
                job.join(60)
            assert [job.error for job in jobs] == [None, None]
            assert jobs[0].answered == 3000
            assert jobs[1].spent
            assert spend(stub, "free").computed == 3000
            assert spend(stub, "bounded").computed == 2000


def test_money_at_a_price(tmp_path):
    with serving(**arguments(tmp_path), price_nanos=500, currency="EUR") as server:
        put(server, "/v1/budgets/default", unit="money", period="month", limit=500 * 20)
        with TeacherClient(server.grpc_address, job="paid") as teacher:
            answer = teacher.label(pixels(15))
            assert (answer.cost.money_nanos, answer.cost.currency) == (7500, "EUR")
            assert answer.budgets[0].left == 2500
            with pytest.raises(BudgetSpent, match=r"0\.0000025 EUR are left, until it begins anew on \d{4}-\d\d-01"):
                teacher.label(pixels(6, seed=1))
        assert metric(server, "preceptor_cost_total", job="paid", currency="EUR") == pytest.approx(7.5e-6)
        assert metric(server, "preceptor_budget_left", tenant="default", unit="money") == pytest.approx(2.5e-6)
