"""Looking answers up before, or instead of, sending samples: against a small server whose cache is a dict."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
import torch
from google.protobuf import json_format

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc, wire
from protos.keys import sample_keys
from student_worker import TeacherClient
from student_worker.errors import FingerprintChanged, InvalidQuery, NotServed, TeacherFailed
from student_worker.losses import TopK
from tests.asking import LARGE, direct, pixels
from tests.teachers import TINY

BATCH = 8  # so a part of a query has 32 samples
NANOS = 7


class Caching(teacher_pb2_grpc.TeacherServicer):
    """Answers as `tiny` does and caches by namespace and key; keeps all requests."""

    def __init__(self, max_message_bytes=2**26):
        self.description = json_format.ParseDict(
            TINY | {"name": "tiny", "fingerprint": "f" * 32}, pb.TeacherDescription()
        )
        self.description.inputs[0].dtypes.append(pb.DATA_TYPE_UINT8)
        self.description.outputs[0].shape.append(10)
        self.description.limits.CopyFrom(
            pb.Limits(max_message_bytes=max_message_bytes, max_samples_per_query=4096, max_batch_size=BATCH)
        )
        self.cache = {}
        self.looked_up, self.labelled = [], []
        self.ids = {}
        self.lock = threading.Lock()

    def Describe(self, request, context):
        return pb.DescribeResponse(teachers=[self.description])

    def Lookup(self, request, context):
        self.check(request, context)
        self.looked_up.append(request)
        there = [(request.cache_namespace, key) in self.cache for key in request.keys]
        rows = [
            self.cache[request.cache_namespace, key] for key, found in zip(request.keys, there, strict=True) if found
        ]
        return pb.LookupResponse(
            fingerprint=self.description.fingerprint,
            found=there,
            answers=[wire.encode_answers(np.stack(rows), request.outputs[0])] if rows else [],
        )

    def Label(self, request, context):
        self.check(request, context)
        inputs = wire.decode_inputs(request.inputs)
        keys = sample_keys(self.description.fingerprint, inputs)
        logits = direct(inputs["x"].copy())
        with self.lock:
            self.labelled.append(request)
            if request.request_id and self.ids.setdefault(request.request_id, keys) != keys:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "request_id: used for other samples")
            self.cache |= {(request.cache_namespace, key): row for key, row in zip(keys, logits, strict=True)}
        return pb.LabelResponse(
            fingerprint=self.description.fingerprint,
            answers=[wire.encode_answers(logits, request.outputs[0])],
            sources=[pb.SOURCE_COMPUTED] * len(keys),
            cost=pb.Cost(samples=len(keys), money_nanos=NANOS * len(keys), currency="EUR"),
            budgets=[pb.Budget(name="team", limit=1000, left=1000 - len(keys))],
        )

    def check(self, request, context):
        if request.expected_fingerprint != self.description.fingerprint:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another one")

    def sent(self):
        return [pixel for request in self.labelled for pixel in wire.decode_inputs(request.inputs)["x"]]


@contextmanager
def serving(servicer):
    server = grpc.server(ThreadPoolExecutor(4), options=LARGE)
    teacher_pb2_grpc.add_TeacherServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture
def teacher():
    return Caching()


@pytest.fixture
def address(teacher):
    with serving(teacher) as address:
        yield address


@pytest.fixture
def client(address):
    with TeacherClient(address) as client:
        yield client


def close(logits, x):
    np.testing.assert_allclose(logits.numpy(), direct(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- lookup


def test_nothing_is_known_of_an_empty_cache_and_nothing_is_computed(client, teacher):
    looked = client.lookup(pixels(5))
    assert looked.found.dtype == torch.bool
    assert looked.found.tolist() == [False] * 5
    assert looked.answer is None
    assert teacher.labelled == []


def test_what_is_found_comes_in_the_samples_order(client, teacher):
    x = pixels(40)
    known = [31, 3, 17, 4]
    client.label(x[known])
    looked = client.lookup(torch.from_numpy(x))
    assert looked.found.nonzero()[:, 0].tolist() == sorted(known)
    close(looked.answer.logits, x[sorted(known)])
    assert looked.answer.sources == ("cached",) * 4
    assert looked.answer.cost == pb.Cost()
    assert looked.answer.fingerprint == looked.answer.description.fingerprint == "f" * 32
    assert len(teacher.labelled) == 1
    assert teacher.looked_up[0].expected_fingerprint == "f" * 32


def test_a_lookup_travels_in_parts_of_a_thousand_keys(client, teacher):
    x = pixels(2500)
    client.label(x[990:1010])
    looked = client.lookup(x)
    assert [len(request.keys) for request in teacher.looked_up] == [1000, 1000, 500]
    assert looked.found.nonzero()[:, 0].tolist() == list(range(990, 1010))
    close(looked.answer.logits, x[990:1010])


def test_a_lookup_asks_for_no_more_than_fits_a_reply():
    """A reply of 4 kB beside what it says of itself: 41 bytes an answer, so 99."""
    teacher = Caching(max_message_bytes=2**16 + 4096)
    with serving(teacher) as address, TeacherClient(address) as client:
        client.lookup(pixels(250))
    assert [len(request.keys) for request in teacher.looked_up] == [99, 99, 52]


@pytest.mark.parametrize(("encoding", "k"), [("float16", 0), ("top_k", 3)])
def test_answers_are_found_in_the_encoding_asked_for(address, encoding, k):
    x = pixels(6)
    with TeacherClient(address, encoding=encoding, k=k, temperature=4.0) as client:
        told = client.label(x[:4]).logits
        found = client.lookup(x).answer.logits
    if k:
        assert isinstance(found, TopK)
        assert torch.equal(found.indices, torch.from_numpy(direct(x[:4])).topk(3, dim=1).indices)
        assert torch.equal(found.tail_mass, told.tail_mass)
        assert found.temperature == 4.0
    else:
        assert torch.equal(found, told)


def test_samples_that_contradict_the_description_are_not_looked_up(client, teacher):
    with pytest.raises(InvalidQuery, match=r"samples of \[2, 8, 8\]"):
        client.lookup(pixels(2)[:, :2])
    assert teacher.looked_up == []


# ---------------------------------------------------------------- look_up_first


def test_only_the_misses_are_uploaded_and_the_order_is_the_samples(client, teacher):
    x = pixels(100)  # four parts
    known = [2, 30, 33, 34, 35, 70, 99]
    client.label(x[known])
    teacher.labelled.clear()
    answer = client.label(x, look_up_first=True)
    close(answer.logits, x)
    assert [place for place in range(100) if answer.sources[place] == "cached"] == known
    assert set(answer.sources) == {"cached", "computed"}
    misses = np.delete(x, known, axis=0)
    assert sorted(pixel.tobytes() for pixel in teacher.sent()) == sorted(pixel.tobytes() for pixel in misses)
    assert answer.cost == pb.Cost(samples=93, money_nanos=93 * NANOS, currency="EUR")
    assert [budget.name for budget in answer.budgets] == ["team"]


@pytest.mark.parametrize("known", [range(32), range(32, 64)])
def test_a_part_that_is_found_whole_is_not_asked_about(client, teacher, known):
    """The cost and the budgets are the other part's, whichever comes first."""
    x = pixels(64)
    client.label(x[known])
    teacher.labelled.clear()
    answer = client.label(x, look_up_first=True)
    close(answer.logits, x)
    assert len(teacher.labelled) == 1
    assert (answer.cost.samples, answer.cost.currency, len(answer.budgets)) == (32, "EUR", 1)


def test_all_hits_make_no_label_call_and_cost_nothing(client, teacher):
    x = pixels(40)
    client.label(x)
    teacher.labelled.clear()
    answer = client.label(x[::-1].copy(), request_id="again", look_up_first=True)
    close(answer.logits, x[::-1].copy())
    assert teacher.labelled == []
    assert answer.sources == ("cached",) * 40
    assert answer.cost == pb.Cost()
    assert answer.budgets == ()


def test_no_hits_are_labelled_as_they_are(client, teacher):
    x = pixels(40)
    answer = client.submit(x, look_up_first=True).result(30)
    close(answer.logits, x)
    assert answer.sources == ("computed",) * 40
    assert sum(len(request.keys) for request in teacher.looked_up) == len(teacher.sent()) == 40


def test_top_k_answers_are_put_in_order_too(address):
    x = pixels(12)
    with TeacherClient(address, encoding="top_k", k=3, temperature=4.0) as client:
        plain = client.label(x).logits
    with TeacherClient(address, encoding="top_k", k=3, temperature=4.0, cache_namespace="mine") as client:
        client.label(x[1::2])
        mixed = client.label(x, look_up_first=True)
    assert mixed.sources == ("computed", "cached") * 6
    for field in ("values", "indices", "tail_mass"):
        torch.testing.assert_close(getattr(mixed.logits, field), getattr(plain, field))
    assert mixed.logits.temperature == 4.0


def test_submit_does_not_wait_for_the_lookup(teacher):
    asked, go_on = threading.Event(), threading.Event()

    class Held(Caching):
        def Lookup(self, request, context):
            asked.set()
            assert go_on.wait(30)
            return super().Lookup(request, context)

    with serving(Held()) as address, TeacherClient(address) as client:
        future = client.submit(pixels(3), look_up_first=True)
        assert asked.wait(30)
        assert not future.done()
        go_on.set()
        close(future.result(30).logits, pixels(3))


def test_to_read_the_cache_and_to_bypass_it_is_a_contradiction(client, teacher):
    with pytest.raises(ValueError, match="give up one of the two"):
        client.label(pixels(2), cache_mode="bypass", look_up_first=True)
    assert teacher.labelled == teacher.looked_up == []


def test_a_server_without_lookup_says_so_and_is_not_sent_all_of_it():
    class Older(Caching):
        def Lookup(self, request, context):
            return teacher_pb2_grpc.TeacherServicer.Lookup(self, request, context)

    teacher = Older()
    with serving(teacher) as address, TeacherClient(address) as client:
        for call in (client.lookup, lambda x: client.label(x, look_up_first=True)):
            with pytest.raises(NotServed):
                call(pixels(2))
        assert teacher.labelled == []


# ---------------------------------------------------------------- namespaces and ids


def test_a_namespace_travels_with_both_calls_and_keeps_answers_apart(address, teacher):
    x = pixels(4)
    with TeacherClient(address, cache_namespace="compare/1") as mine, TeacherClient(address) as shared:
        mine.label(x, look_up_first=True)
        assert shared.lookup(x).answer is None
        assert mine.lookup(x).found.all()
    assert {request.cache_namespace for request in teacher.labelled} == {"compare/1"}
    assert [request.cache_namespace for request in teacher.looked_up] == ["compare/1", "", "compare/1"]


@pytest.mark.parametrize("name", ["a b", "ä", "x" * 129])
def test_a_namespace_is_named_as_a_job_is(name):
    with pytest.raises(ValueError, match="cache_namespace: '"):
        TeacherClient("a:1", cache_namespace=name)


def test_the_id_of_what_is_sent_says_what_it_is(client, teacher):
    """A replay that uploads other misses, or values that differ in the last bit, stands under another id."""
    x = pixels(40)
    client.label(x, request_id="run/3")
    first = {request.request_id for request in teacher.labelled}
    assert len(first) == 2  # one a part
    assert all(one.startswith("run/3/") and len(one) == len("run/3/") + 16 for one in first)
    client.label(x, request_id="run/3")
    assert {request.request_id for request in teacher.labelled} == first
    x[0, 0, 0, 0] ^= 1
    client.label(x, request_id="run/3")
    client.label(x, request_id="run/3", look_up_first=True)  # all is known by now
    teacher.cache.clear()
    client.label(x[5:9], request_id="other")
    client.label(x, request_id="run/3", look_up_first=True)
    assert len({request.request_id for request in teacher.labelled} - first) == 3


def test_equal_parts_have_one_id_and_queries_without_one_none(client, teacher):
    x = pixels(32)
    client.label(np.concatenate([x, x]), request_id="twice")
    assert len(teacher.labelled) == 2
    assert len({request.request_id for request in teacher.labelled}) == 1
    teacher.labelled.clear()
    client.label(x)
    assert [request.request_id for request in teacher.labelled] == [""]


# ---------------------------------------------------------------- contradictions


def test_another_teacher_between_lookup_and_label_is_noticed():
    class Replaced(Caching):
        def Lookup(self, request, context):
            reply = super().Lookup(request, context)
            self.description.fingerprint = "e" * 32
            return reply

    teacher = Replaced()
    with serving(teacher) as address, TeacherClient(address) as client:
        x = pixels(4)
        client.label(x[:2])
        with pytest.raises(FingerprintChanged, match="another one"):
            client.label(x, look_up_first=True)
        assert len(teacher.labelled) == 1


def answers(n, classes=10):
    return [wire.encode_answers(np.zeros((n, classes), np.float32), pb.OutputSpec(name="logits"))]


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        ({"fingerprint": "e" * 32, "found": [False] * 3}, FingerprintChanged, "answered by eee"),
        ({"found": [True] * 2, "answers": answers(2)}, TeacherFailed, "of 2 keys .* asked were 3"),
        ({"found": [True] * 4, "answers": answers(4)}, TeacherFailed, "of 4 keys .* asked were 3"),
        ({"found": [True, True, False], "answers": answers(3)}, TeacherFailed, r"\[3, 10\]\), asked were .*\[2, 10\]"),
        ({"found": [True, True, False], "answers": answers(2, 9)}, TeacherFailed, r"\[2, 9\]"),
        ({"found": [True, True, False]}, TeacherFailed, "cannot be read"),
        ({"found": [False] * 3, "answers": answers(1)}, TeacherFailed, "says that none was found"),
    ],
)
@pytest.mark.parametrize("call", ["lookup", "label"])
def test_a_lookup_that_contradicts_itself_is_an_error_of_the_teacher(reply, error, words, call):
    class Liar(Caching):
        def Lookup(self, request, context):
            return pb.LookupResponse(**{"fingerprint": "f" * 32} | reply)

    teacher = Liar()
    with serving(teacher) as address, TeacherClient(address) as client:
        ask = client.lookup if call == "lookup" else lambda x: client.label(x, look_up_first=True)
        with pytest.raises(error, match=words):
            ask(pixels(3))
    assert teacher.labelled == []


@pytest.mark.parametrize(("spec", "words"), [({"k": 2}, "k 2"), ({"temperature": 1.0}, "temperature 1")])
def test_a_top_k_answer_of_another_k_or_temperature_is_refused(spec, words):
    class Deaf(Caching):
        def Lookup(self, request, context):
            request.outputs[0].MergeFrom(pb.OutputSpec(**spec))
            return super().Lookup(request, context)

    with serving(Deaf()) as address:
        with TeacherClient(address, encoding="top_k", k=3, temperature=4.0) as client:
            client.label(pixels(3))
            with pytest.raises(TeacherFailed, match=f"has .*{words}.*asked were 3 and 4"):
                client.lookup(pixels(3))


def test_a_reply_with_too_few_sources_is_refused():
    class Silent(Caching):
        def Label(self, request, context):
            reply = super().Label(request, context)
            reply.sources.pop()
            return reply

    with serving(Silent()) as address, TeacherClient(address) as client:
        with pytest.raises(TeacherFailed, match="has 1 sources, asked were 2 samples"):
            client.label(pixels(2))
