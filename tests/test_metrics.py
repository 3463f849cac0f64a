"""What /metrics says: bounded labels, counts that conserve samples, how things stand, and the docs that list it all."""

import asyncio
import re
import threading
from contextlib import contextmanager

import grpc
import pytest
import torch
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from protos import teacher_pb2 as pb
from student_worker import TeacherClient
from teacher_server.auth import Caller
from teacher_server.errors import DeviceLost, ForwardFailed
from teacher_server.metrics import MAX_JOBS, Metrics
from tests.asking import asking, get, metric, pixels, put, refusal, stub_at
from tests.batching import Clock
from tests.serving import GATE, ROOT, arguments, serving, until
from tests.test_system import small_student, to_student

TEACHER = pb.TeacherDescription(flops_per_sample=1e6, price=pb.Price(nanos_per_sample=2000, currency="EUR"))


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"preceptor_{name}", labels)


# ---------------------------------------------------------------- labels


def test_a_job_that_is_silent_for_an_hour_makes_room_for_another():
    clock = Clock()
    metrics = Metrics(clock=clock)
    callers = [Caller("red", f"job-{number}") for number in range(MAX_JOBS)]
    for caller in callers:
        metrics.of(caller).asked.inc(3)
        metrics.charged(caller, 2, 10, TEACHER)
        metrics.query(caller, "answered")
    late, later = Caller("blue", "late"), Caller("blue", "later")
    metrics.of(late).asked.inc(5)
    clock.now += 3599
    metrics.of(callers[0]).asked.inc()
    assert metrics.label(late) == ("blue", "other")
    clock.now += 1
    metrics.of(late).asked.inc(7)
    metrics.of(late).asked.inc(7)
    assert metrics.label(late) == late
    assert value(metrics, "asked_samples_total", tenant="blue", job="late") == 14
    assert value(metrics, "asked_samples_total", tenant="blue", job="other") == 5
    assert value(metrics, "asked_samples_total", tenant="red", job="job-0") == 4, "it was heard of a second ago"
    assert "job-1" not in {sample.labels.get("job") for family in metrics.families() for sample in family.samples}, (
        "none of its series stays"
    )
    for caller in callers[2:]:
        metrics.of(caller)
    metrics.of(later).asked.inc()
    assert metrics.label(later) == ("blue", "other")


def test_a_job_called_other_shares_the_label_and_keeps_its_place():
    clock = Clock()
    metrics = Metrics(clock=clock)
    other = Caller("red", "other")
    metrics.of(other).asked.inc(1)
    clock.now += 4000
    for number in range(MAX_JOBS + 1):
        metrics.of(Caller("red", f"job-{number}")).asked.inc(1)
    assert value(metrics, "asked_samples_total", tenant="red", job="other") == 2


def test_a_query_that_was_never_admitted_makes_no_series_for_its_job(stub, server):
    job = [("preceptor-job", "never-admitted")]
    before = metric(server, "preceptor_queries_total", job="other", outcome="invalid_query")
    assert refusal(stub.Label, pb.LabelRequest(), metadata=job)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert metric(server, "preceptor_queries_total", job="other", outcome="invalid_query") == before + 1
    assert "never-admitted" not in get(server, "/metrics")


# ---------------------------------------------------------------- counts


def test_failed_forward_passes_are_counted_by_kind():
    metrics = Metrics()
    for outcome in (ForwardFailed("no"), DeviceLost("gone"), ForwardFailed("no"), {}):
        metrics.batch(1, [(None, range(5))], 1000, outcome)
    kinds = {kind: value(metrics, "device_errors_total", kind=kind) for kind in ("failed", "lost", "out_of_memory")}
    assert kinds == {"failed": 2, "lost": 1, "out_of_memory": 0}
    assert value(metrics, "batch_size_sum") == 5


def test_forwarded_is_charged_and_wasted_and_own_and_the_ledger_has_it(tmp_path):
    with serving(**arguments(tmp_path, "wordy"), price_nanos=500, currency="EUR") as server:
        with stub_at(server.grpc_address) as stub, TeacherClient(server.grpc_address, job="one") as teacher:
            teacher.label(pixels(70))
            teacher.label(pixels(70))
            teacher.label(pixels(20, seed=1), cache_mode="bypass")
            refusal(stub.Label, asking(pixels(13)), metadata=[("preceptor-job", "two")])
        until(lambda: metric(server, "preceptor_ledger_pending_samples") == 0)
        own = metric(server, "preceptor_platform_samples_total", account="own")
        assert own == 1 + 65, "loading, and a warm-up with 64 and 1"
        assert metric(server, "preceptor_platform_samples_total", account="wasted", reason="failed") == 13
        assert metric(server, "preceptor_charged_samples_total", tenant="default", job="one") == 90
        forwarded = metric(server, "preceptor_forwarded_samples_total")
        assert forwarded == metric(server, "preceptor_ledger_forwarded_samples") == 90 + 13 + own
        assert metric(server, "preceptor_cost_total", currency="EUR") == pytest.approx(90 * 500e-9)
        assert metric(server, "preceptor_queries_total", job="one", outcome="answered") == 3
        assert metric(server, "preceptor_queries_total", job="two", outcome="forward_failed") == 1
        assert metric(server, "preceptor_device_errors_total", kind="failed") == 1
        cached, coalesced = (
            metric(server, "preceptor_samples_total", job="one", source=source) for source in ("cached", "coalesced")
        )
        assert cached + coalesced == 70, "its answers may still have been on their way into the cache"
        assert metric(server, "preceptor_cache_hits_total") == cached
        assert metric(server, "preceptor_cache_misses_total") == 70
        busy = metric(server, "preceptor_device_busy_seconds_total")
        assert busy > metric(server, "preceptor_device_seconds_total", job="one") > 0
        assert metric(server, "process_resident_memory_bytes") > 1e6


def test_a_query_that_is_given_up_is_counted_as_such(tmp_path):
    with serving(**arguments(tmp_path, "gated")) as server, stub_at(server.grpc_address) as stub:
        with GATE.shut():
            call = stub.Label.future(asking(pixels(2)), metadata=[("preceptor-job", "fickle")])
            assert GATE.reached.acquire(timeout=10)
            call.cancel()
            until(lambda: metric(server, "preceptor_queries_total", job="fickle", outcome="cancelled") == 1)


# ---------------------------------------------------------------- how things stand


@contextmanager
def waiting(tmp_path):
    """A server with a budget, 40 samples in a pass and 100 that wait."""
    given = arguments(tmp_path, "gated") | {"max_queue_size": 400, "max_batch_size": 50, "price_nanos": 10**9}
    with serving(**given) as server, stub_at(server.grpc_address) as stub:
        put(server, "/v1/budgets/default", unit="money", period="month", limit=200 * 10**9)
        stub.Label(asking(pixels(30)), metadata=[("preceptor-job", "first")])
        with GATE.shut():
            calls = [stub.Label.future(asking(pixels(40)), metadata=[("preceptor-job", "first")])]
            assert GATE.reached.acquire(timeout=10)
            calls.append(stub.Label.future(asking(pixels(100)), metadata=[("preceptor-job", "next")]))
            until(lambda: metric(server, "preceptor_queue_samples", job="next") == 100)
            yield server
        for call in calls:
            call.result(30)


def test_queue_budget_and_teacher_as_they_stand(tmp_path):
    with waiting(tmp_path) as server:
        assert metric(server, "preceptor_queue_used_ratio") == 100 / 400
        assert metric(server, "preceptor_max_batch_size_samples") == 50
        assert metric(server, "preceptor_largest_batch_samples") == 50
        budget = {"tenant": "default", "job": "", "unit": "money", "period": "month"}
        until(lambda: metric(server, "preceptor_budget_left", **budget) == 170)
        assert metric(server, "preceptor_budget_limit", **budget) == 200
        assert metric(server, "preceptor_ledger_pending_samples") == 40, "what is under way is on its way"
        assert metric(server, "preceptor_ready") == 1
        assert (
            metric(server, "preceptor_store_up", store="cache")
            == metric(server, "preceptor_store_up", store="ledger")
            == 1
        )
        about = {"teacher": "teacher", "fingerprint": server.description.fingerprint, "precision": "fp32"}
        assert metric(server, "preceptor_teacher_info", **about) == 1


def test_a_page_is_read_on_the_loops_thread_and_written_beside_it():
    """What is read belongs to the event loop; what was counted has locks of its own."""
    metrics, threads = Metrics(), []

    class Counted(Collector):
        def collect(self):
            threads.append(("counted", threading.get_ident()))
            return []

    def read():
        threads.append(("read", threading.get_ident()))
        return [GaugeMetricFamily("preceptor_stands", "How.", value=3)]

    metrics.registry.register(Counted())
    threads.clear()
    metrics.watch(read)
    page = asyncio.run(metrics.page())
    (first, here), (second, elsewhere) = threads
    assert (first, second) == ("read", "counted")
    assert here == threading.get_ident() != elsewhere
    assert b"preceptor_stands 3.0" in page
    assert b"preceptor_cache_hits_total 0.0" in page


# ---------------------------------------------------------------- what the docs say of it


def rows(text):
    """{metric: (type, labels, what)} of the tables."""
    found = re.findall(r"^\| `(preceptor_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", text, re.MULTILINE)
    assert len({name for name, *_ in found}) == len(found)
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels)), what) for name, kind, labels, what in found}


def exported(page):
    families = {}
    for family in text_string_to_metric_families(page):
        if family.name.startswith("preceptor_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            assert family.samples, f"{name} has no series in this test: give it one"
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            families[name] = (family.type, frozenset(labels), family.documentation)
    return families


DOCS = (ROOT / "docs/metrics.md").read_text()


def documented(*, students):
    return {name: row for name, row in rows(DOCS).items() if name.startswith("preceptor_student_") == students}


def test_the_docs_list_every_metric_with_type_labels_and_meaning(tmp_path):
    with waiting(tmp_path) as server:
        assert documented(students=False) == exported(get(server, "/metrics"))


def test_the_docs_list_every_metric_of_a_student_and_their_loop_runs(server):
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    student = small_student()
    names = {
        "loader": [to_student(torch.from_numpy(pixels(64, seed=i))) for i in range(2)],
        "student": student,
        "optimizer": torch.optim.SGD(student.parameters(), 0.1),
    }
    exec(code.replace("localhost:8001", server.grpc_address).replace("port=9101", "planned_steps=2"), names)
    page = names["metrics"].page().decode()
    assert documented(students=True) == exported(page)
    assert 'preceptor_student_steps_total{job="my-run",rank="0",tenant="default"} 2.0' in page
    names["teacher"].close()
