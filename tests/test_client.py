"""TeacherClient against real servers: what it sends, what it refuses, when it retries, and its own exceptions."""

import hashlib
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from student_worker import TeacherClient
from student_worker.errors import (
    FingerprintChanged,
    InvalidQuery,
    NotAllowed,
    NotServed,
    TeacherError,
    TeacherFailed,
    TeacherUnavailable,
    UnknownTeacher,
)
from student_worker.losses import TopK, distillation_loss
from tests.asking import direct, metric, pixels
from tests.serving import GATE, arguments, free_port, serving, until
from tests.teachers import save_pair, save_picky

JOBS = itertools.count()


@pytest.fixture
def job():
    return f"client-{next(JOBS)}"


@pytest.fixture
def client(server, job):
    """The server is shared by all tests, its cache is not."""
    with TeacherClient(server.grpc_address, job=job, cache_namespace=job) as client:
        yield client


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray, lambda x: {"x": torch.from_numpy(x)}])
def test_tensors_arrays_and_mappings_get_the_direct_answers(client, kind):
    x = pixels(10)
    answer = client.label(kind(x))
    np.testing.assert_allclose(answer.logits.numpy(), direct(x), rtol=1e-4, atol=1e-4)
    assert answer.logits.dtype == torch.float32
    assert answer.sources == ("computed",) * 10
    assert answer.fingerprint == answer.description.fingerprint == client.describe().fingerprint
    assert answer.cost.samples == 10


def test_top_k_answers_bound_the_dense_loss(server, client):
    x = pixels(16)
    student = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
    dense = distillation_loss(student, client.label(x).logits, 4.0)
    losses = []
    for k in (3, 10):
        with TeacherClient(server.grpc_address, encoding="top_k", k=k, temperature=4.0) as top:
            answer = top.label(x)
            assert isinstance(answer.logits, TopK)
            losses.append(distillation_loss(student, answer.logits, 4.0))
    assert losses[0] < dense
    torch.testing.assert_close(losses[1], dense)
    with TeacherClient(server.grpc_address, encoding="float16") as half:
        torch.testing.assert_close(half.label(x).logits, client.label(x).logits, rtol=1e-3, atol=1e-2)


def test_bulk_data_goes_in_parts_of_a_few_batches_under_the_message_limit(tmp_path):
    for limit, parts in ((3 * 2**15, 9), (2**26, 6)):  # room for 170 samples; four batches of 64
        with (
            serving(**arguments(tmp_path), max_message_bytes=limit) as server,
            TeacherClient(server.grpc_address, job="split", window=3) as client,
        ):
            x = pixels(1500)
            answer = client.label(x)
            np.testing.assert_allclose(answer.logits.numpy(), direct(x), rtol=1e-4, atol=1e-4)
            assert len(answer.sources) == answer.cost.samples == 1500
            assert metric(server, "preceptor_requests_total", call="Label", code="OK") == parts
            assert metric(server, "preceptor_asked_samples_total", job="split") == 1500
    with serving(**arguments(tmp_path), max_message_bytes=2**16) as server:
        with TeacherClient(server.grpc_address) as client, pytest.raises(InvalidQuery, match="raise its --max-message"):
            client.label(pixels(1))


def test_bulk_data_does_not_crowd_itself_out(tmp_path):
    """More than a job's queue holds, sent by one label(): its own parts wait for one another, and are asked once."""
    settings = arguments(tmp_path) | {"max_queue_size": 256, "max_batch_size": 8}
    with serving(**settings) as server, TeacherClient(server.grpc_address, job="bulk") as client:
        assert len(client.label(pixels(2000)).sources) == 2000
        assert metric(server, "preceptor_asked_samples_total", job="bulk") == 2000
        assert metric(server, "preceptor_requests_total", call="Label", code="RESOURCE_EXHAUSTED") == 0


def test_once_a_part_has_failed_no_other_is_sent(tmp_path):
    with serving(**arguments(tmp_path, "gated"), max_batch_size=1) as server:
        with TeacherClient(server.grpc_address, job="stopped", window=1) as client, ThreadPoolExecutor(1) as other:
            client.describe()
            x = np.zeros((40, 3, 8, 8), np.float32)  # ten parts
            with GATE.shut():
                future = other.submit(client.submit, x)  # blocks: one part in flight, one waiting for the window
                assert GATE.reached.acquire(timeout=30)
                client._description.fingerprint = "0" * 32  # the next ones are refused
            with pytest.raises(FingerprintChanged):
                future.result(30).result(30)
            assert metric(server, "preceptor_asked_samples_total", job="stopped") <= 8


def test_a_query_can_be_cancelled(tmp_path):
    with serving(**arguments(tmp_path, "gated"), max_batch_size=1) as server:
        with TeacherClient(server.grpc_address, job="cancelled", window=20) as client:
            client.describe()
            with GATE.shut():
                future = client.submit(pixels(40))
                assert GATE.reached.acquire(timeout=30)
                assert future.cancel()
            assert future.cancelled()
            assert len(client.label(pixels(1)).sources) == 1


def test_a_window_of_queries_is_in_flight_and_submit_waits_for_room(tmp_path):
    with serving(**arguments(tmp_path, "gated"), max_batch_size=2) as server:
        with TeacherClient(server.grpc_address, job="window", window=3) as client, ThreadPoolExecutor(1) as other:
            client.describe()
            with GATE.shut():
                futures = [client.submit(pixels(2, seed=i)) for i in range(3)]
                fourth = other.submit(client.submit, pixels(2, seed=3))
                until(lambda: metric(server, "preceptor_asked_samples_total", job="window") >= 6)
                assert not fourth.done()
            for i, future in enumerate([*futures, fourth.result(30)]):
                np.testing.assert_allclose(
                    future.result(30).logits.numpy(), direct(pixels(2, seed=i)), rtol=1e-4, atol=1e-4
                )


def test_a_closed_client_says_so_and_lets_nobody_wait(tmp_path):
    with serving(**arguments(tmp_path, "gated")) as server:
        client = TeacherClient(server.grpc_address)
        client.describe()
        with GATE.shut():
            future = client.submit(pixels(1))
            assert GATE.reached.acquire(timeout=30)
            client.close()
            with pytest.raises(TeacherUnavailable):
                future.result(10)
        with pytest.raises(TeacherUnavailable, match="closed"):
            client.label(pixels(1))
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("teacher-client")])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (pixels(0), "holds no sample"),
        (pixels(2)[:, :2], r"samples of \[2, 8, 8\]"),
        (pixels(2).astype(np.float64), "float64 has no place"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16), r"use \.float\(\)"),
        (pixels(2).astype(np.float32), "normalised exactly once"),  # raw pixels as floats
        (np.full((2, 3, 8, 8), np.nan, np.float32), "NaN or infinite"),
        ({"image": pixels(2)}, r"got \['image'\]"),
        ({"x": pixels(2), "y": pixels(3)}, "differ"),
        (torch.tensor(1.0), "holds no sample"),
        ([[1.0]], "a list cannot be sent"),
        (None, "a NoneType cannot be sent"),
    ],
)
def test_samples_that_contradict_the_description_never_leave(client, server, job, x, words):
    with pytest.raises(InvalidQuery, match=words):
        client.label(x)
    assert metric(server, "preceptor_asked_samples_total", job=job) == 0


def test_a_teacher_of_several_inputs_wants_a_mapping(tmp_path):
    with serving(model="tests.teachers:pair", weights=save_pair(tmp_path), grpc_port=0, http_port=0) as server:
        with TeacherClient(server.grpc_address) as client:
            with pytest.raises(InvalidQuery, match="give a mapping"):
                client.label(np.zeros((2, 4), np.float32))
            both = {"x": torch.zeros(2, 4), "tokens": torch.zeros(2, 5, dtype=torch.int64)}
            assert client.label(both).logits.shape == (2, 3)


def test_unknown_teachers_and_wrong_addresses_are_told(server):
    with TeacherClient(server.grpc_address, teacher="other") as client:
        with pytest.raises(UnknownTeacher, match="'other' is not served here"):
            client.label(pixels(1))
    with TeacherClient(f"127.0.0.1:{free_port()}", timeout=0.5) as client:
        with pytest.raises(TeacherUnavailable, match=r"UNAVAILABLE: 127\.0\.0\.1:\d+.*of at most 0\.5"):
            client.describe()
    for wrong in ("", "a:1,,b:2"):
        with pytest.raises(ValueError, match="names no server"):
            TeacherClient(wrong)
    for wrong, words in (
        ({"window": 0}, "window"),
        ({"timeout": float("inf")}, "timeout"),
        ({"encoding": "bf16"}, "encoding is 'bf16'"),
        ({"encoding": "top_k"}, "k of at least 1"),
        ({"k": -1}, "k -1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"job": "späte"}, "job 'späte'"),
        ({"token": "sécret"}, "token"),
    ):
        with pytest.raises(ValueError, match=words):
            TeacherClient("a:1", **wrong)
    for wrong in ("http://localhost:8001", "localhost"):
        with pytest.raises(ValueError, match="is not host:port"):
            TeacherClient(wrong)


def test_a_token_that_is_missing_is_not_retried(tmp_path):
    (tmp_path / "tokens").write_text(f"{hashlib.sha256(b'v').hexdigest()} board viewer\n")
    with serving(**arguments(tmp_path), tokens_file=tmp_path / "tokens") as server:
        for token in (None, "wrong"):
            with TeacherClient(server.grpc_address, token=token) as client, pytest.raises(NotAllowed, match="token"):
                client.describe()
        assert metric(server, "preceptor_requests_total", token="v", call="Describe", code="UNAUTHENTICATED") == 2


def test_a_teacher_that_fails_and_one_that_does_not_know_are_told_apart(tmp_path, server):
    with serving(model="tests.teachers:picky", weights=save_picky(tmp_path), grpc_port=0, http_port=0) as broken:
        with TeacherClient(broken.grpc_address) as client:
            x = np.zeros((1, 3, 8, 8), np.float32)
            x[0, 0, 0, 0] = 1.25
            with pytest.raises(TeacherFailed, match="the magic value"):
                client.label(x)
    with TeacherClient(server.grpc_address) as client:
        client._spec.name = "features.1"
        with pytest.raises(NotServed, match=r"'features\.1' is not served"):
            client.label(pixels(1))
    assert issubclass(NotServed, TeacherError)
