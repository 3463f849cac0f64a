"""The service without a transport: request ids, deadlines, cache modes and namespaces, and Lookup."""

import asyncio
import time
from contextlib import asynccontextmanager

import numpy as np
import pytest

from protos import teacher_pb2 as pb
from protos import wire
from protos.keys import sample_keys
from teacher_server import accounts
from teacher_server.auth import Caller
from teacher_server.errors import (
    BudgetSpent,
    Draining,
    InvalidQuery,
    NotImplementedHere,
    OtherFingerprint,
    PastDeadline,
    QueueFull,
    UnknownTeacher,
)
from teacher_server.service import Served, Service
from tests.batching import Gate
from tests.flying import TEACHER, flying, plane, settled, wait

A, B = Caller("a", "job"), Caller("b", "job")
TOP_1 = pb.OutputSpec(name="logits", encoding=pb.ENCODING_TOP_K, k=1)


@asynccontextmanager
async def service(*args, **options):
    async with plane(*args, **options) as p:
        served = Service(p.metrics, accounts.Books(p.store))
        served.serve(Served(TEACHER, p.batcher, p.cache, p.flights, p.books))
        yield served, p
        assert served._running == {}


def x(numbers):
    return np.array(list(numbers), np.float32)[:, None]


def asking(numbers, **fields):
    return pb.LabelRequest(inputs=[wire.encode_tensor("x", x(numbers))], **fields)


def label(served, request, caller=A, deadline=None):
    return asyncio.create_task(served.label(request, caller, deadline))


def right(reply, numbers):
    assert wire.decode_answers(reply.answers[0])[:, 0].tolist() == [n**2 for n in numbers]


def key_of(*numbers):
    return sample_keys(TEACHER.fingerprint, {"x": x(numbers)})


# ------------------------------------------------------------ replies


@flying
async def test_a_reply_says_where_each_answer_came_from_and_what_it_cost():
    async with service() as (served, p):
        first = await label(served, asking([1, 2, 1]))
        await settled()
        second = await label(served, asking([2, 3]), B)
        right(first, [1, 2, 1])
        assert list(first.sources) == [pb.SOURCE_COMPUTED, pb.SOURCE_COMPUTED, pb.SOURCE_COALESCED]
        assert first.cost == pb.Cost(samples=2, money_nanos=10, currency="EUR", flops=20.0, device_nanoseconds=1000)
        assert list(second.sources) == [pb.SOURCE_CACHED, pb.SOURCE_COMPUTED]
        assert second.cost.samples == 1
        for tenant, counts in (("a", (3, 2, 0, 1)), ("b", (2, 1, 1, 0))):
            labels = {"tenant": tenant, "job": "job"}
            asked = p.count("preceptor_asked_samples_total", **labels)
            by_source = [
                p.count("preceptor_samples_total", **labels, source=source)
                for source in ("computed", "cached", "coalesced")
            ]
            assert (asked, *by_source) == counts


@flying
async def test_modes_and_namespaces():
    async with service() as (served, _):
        for fields in (
            {"cache_namespace": "run-1"},
            {"cache_namespace": "run-2"},
            {},
            {"cache_mode": pb.CACHE_MODE_BYPASS},
            {"cache_mode": pb.CACHE_MODE_READ_ONLY, "cache_namespace": "run-3"},
            {"cache_mode": pb.CACHE_MODE_USE, "cache_namespace": "run-3"},
        ):
            reply = await label(served, asking([1], **fields))
            assert list(reply.sources) == [pb.SOURCE_COMPUTED], fields
            await settled()
        for namespace in ("run-1", "run-2", "", "run-3"):
            reply = await label(served, asking([1], cache_namespace=namespace))
            assert list(reply.sources) == [pb.SOURCE_CACHED]
            reply = await label(served, asking([1], cache_namespace=namespace), B)
            assert list(reply.sources) == [pb.SOURCE_COMPUTED if namespace else pb.SOURCE_CACHED]
        for name in ('x"', "x" * 129, "a b"):
            with pytest.raises(InvalidQuery, match="cache_namespace: "):
                await label(served, asking([1], cache_namespace=name))


# ------------------------------------------------------------ request ids


@flying
async def test_the_same_id_still_running_is_joined_and_one_living_caller_keeps_it():
    gate = Gate()
    async with service(gate) as (served, p):
        calls = [
            label(served, asking([1, 2], request_id="r", cache_mode=pb.CACHE_MODE_BYPASS)),
            label(served, asking([1, 2], request_id="r"), deadline=time.monotonic()),
        ]
        with pytest.raises(PastDeadline):
            await wait(calls.pop())
        calls += [
            label(served, asking([1, 2], request_id="r", outputs=[pb.OutputSpec(name="logits", encoding=1)])),
            label(served, asking([1, 2], request_id="r"), deadline=time.monotonic() + 0.05),
        ]
        await p.arrived()
        for other in (
            asking([1, 3], request_id="r"),
            asking([2, 1], request_id="r"),
            asking([1, 2], request_id="r", outputs=[TOP_1]),
        ):
            with pytest.raises(InvalidQuery, match="'r' is under way for other samples or outputs"):
                await label(served, other)
        elsewhere = label(served, asking([7], request_id="r"), B)
        with pytest.raises(PastDeadline):
            await wait(calls.pop())
        calls[0].cancel()
        await settled()
        gate.let_through(10)
        right(await wait(calls[1]), [1, 2])
        right(await wait(elsewhere), [7])
        assert p.charged() == {"a": 2, "b": 1}
        assert p.count("preceptor_asked_samples_total", tenant="a", job="job") == 2, "asked once"


@flying
async def test_when_all_who_wait_for_an_id_have_gone_so_has_the_query_and_it_may_come_again():
    gate = Gate()
    async with service(gate) as (served, p):
        blocker = label(served, asking([99]), B)
        await p.arrived()
        calls = [label(served, asking(range(6), request_id="r")) for _ in range(3)]
        await settled()
        assert p.batcher.depth() == {("a", "job"): 6}
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        again = label(served, asking(range(6), request_id="r"))
        await settled()
        assert p.batcher.depth() == {("a", "job"): 6}
        gate.let_through(10)
        right(await wait(again), range(6))
        await wait(blocker)
        assert p.charged() == {"a": 6, "b": 1}
        assert p.books.wasted.total() == 0


@flying
async def test_all_who_wait_for_an_id_get_its_refusal():
    async with service() as (served, p):
        p.books.left = {A: 1}
        p.store.gate.clear()
        calls = [label(served, asking([1, 2], request_id="r")) for _ in range(3)]
        await settled()
        p.store.gate.set()
        refusals = await wait(asyncio.gather(*calls, return_exceptions=True))
        assert {type(refusal) for refusal in refusals} == {BudgetSpent}
        assert len({id(refusal) for refusal in refusals}) == 3, "each has its own, or its traceback would hold all"


@flying
async def test_a_refusal_keeps_its_hint_for_all():
    gate = Gate()
    async with service(gate, max_queue_size=3) as (served, p):
        tasks = [label(served, asking([99]))]
        await p.arrived()
        tasks.append(label(served, asking([1, 2, 3])))
        await settled()
        for call in [label(served, asking([4, 5], request_id="r")) for _ in range(2)]:
            with pytest.raises(QueueFull) as refused:
                await wait(call)
            assert refused.value.retry_after == 1.0
        gate.let_through(10)
        await wait(asyncio.gather(*tasks))


@flying
async def test_an_id_that_was_answered_is_not_charged_again():
    async with service() as (served, p):
        request = asking([1, 2], request_id="r", cache_mode=pb.CACHE_MODE_BYPASS)
        first = await label(served, request)
        p.books.finished.add("r")
        second = await label(served, request)
        right(second, [1, 2])
        assert (first.cost.samples, second.cost.samples) == (2, 0)
        assert p.books.wasted == {"replay": 2}


# ------------------------------------------------------------ deadlines


@flying
async def test_past_its_deadline_a_query_ends_and_harms_nobody():
    gate = Gate()
    async with service(gate) as (served, p):
        with pytest.raises(PastDeadline, match="on arrival"):
            await label(served, asking([1]), deadline=time.monotonic())
        blocker = label(served, asking([99]), B)
        await p.arrived()
        late = label(served, asking(range(4)), deadline=time.monotonic() + 0.05)
        await settled()
        other = label(served, asking(range(2, 6)), B)
        with pytest.raises(PastDeadline, match="while it waited"):
            await wait(late)
        await settled()
        assert p.batcher.depth() == {("b", "job"): 4}
        gate.let_through(10)
        right(await wait(other), range(2, 6))
        await wait(blocker)
        assert gate.batches[0] == [99]
        assert p.charged() == {"b": 5}


# ------------------------------------------------------------ lookup


@flying
async def test_lookup_gives_what_is_there_computes_nothing_and_charges_nothing():
    async with service() as (served, p):
        await label(served, asking([1, 2]))
        await label(served, asking([3], cache_namespace="n"))
        await settled()
        keys = key_of(3, 2, 5, 1)
        reply = await served.lookup(pb.LookupRequest(keys=keys), B)
        assert reply.fingerprint == TEACHER.fingerprint
        assert list(reply.found) == [False, True, False, True]
        right(reply, [2, 1])
        top = await served.lookup(pb.LookupRequest(keys=keys, outputs=[TOP_1, pb.OutputSpec(name="logits")]), B)
        assert wire.decode_answers(top.answers[0]).values[:, 0].tolist() == [4, 1]
        assert wire.decode_answers(top.answers[1])[:, 0].tolist() == [4, 1]
        named = await served.lookup(pb.LookupRequest(keys=keys, cache_namespace="n"), A)
        assert list(named.found) == [True, False, False, False]
        none = await served.lookup(pb.LookupRequest(keys=keys, cache_namespace="n"), B)
        assert list(none.found) == [False] * 4
        assert not none.answers
        assert p.charged() == {"a": 3}
        assert p.count("preceptor_samples_total", tenant="b", job="job", source="cached") == 4
        assert p.count("preceptor_asked_samples_total", tenant="b", job="job") == 4
        assert p.books.replies[-3:] == [(B, 2, 2, 0), (B, 2, 2, 0), (A, 1, 1, 0)]


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({}, InvalidQuery, "keys: none given"),
        ({"keys": [b"k" * 16, b"k" * 15]}, InvalidQuery, r"keys\[1\]: 15 bytes; a key has 16"),
        ({"keys": [b"k" * 16] * 5001}, InvalidQuery, "keys: 5001 keys; at most 5000"),
        ({"keys": [b"k" * 16], "cache_namespace": "?"}, InvalidQuery, r"cache_namespace: '\?'"),
        ({"keys": [b"k" * 16], "expected_fingerprint": "x"}, OtherFingerprint, "begin a new run"),
        ({"keys": [b"k" * 16], "teacher": "x"}, UnknownTeacher, "'x' is not served"),
        ({"keys": [b"k" * 16], "outputs": [pb.OutputSpec(name="y")]}, NotImplementedHere, "'y' is not served"),
        ({"keys": [b"k" * 16], "outputs": [TOP_1] * 5}, InvalidQuery, "5 given; ask for at most 4"),
    ],
)
@flying
async def test_bad_lookups_say_what_is_wrong(fields, error, words):
    async with service() as (served, p):
        with pytest.raises(error, match=words):
            await served.lookup(pb.LookupRequest(**fields), A)
        assert p.store.lookups == 0


@flying
async def test_the_largest_lookup_is_served_and_a_draining_replica_takes_none():
    async with service() as (served, _):
        reply = await served.lookup(pb.LookupRequest(keys=[b"%016d" % n for n in range(5000)]), A)
        assert len(reply.found) == 5000
        served.drain("draining")
        with pytest.raises(Draining):
            await served.lookup(pb.LookupRequest(keys=[b"k" * 16]), A)
