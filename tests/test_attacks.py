"""Attacks on a real server, small ones; benchmarks/attacks.py has the same with the full counts, and the memory."""

from contextlib import ExitStack

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis import Redis

from protos import teacher_pb2 as pb
from protos import wire
from protos.keys import sample_keys
from tests import attacking
from tests.asking import asking, direct, metric, pixels
from tests.redis_servers import running
from tests.serving import arguments, serving, until


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked")
    file = folder / "tokens"
    file.touch()
    with serving(**arguments(folder), tokens_file=file) as server:
        yield server, file


@pytest.fixture
def target(served):
    server, file = served
    file.write_text("")
    return attacking.Target(server.grpc_address, server.http_address, file)


def counted(served, target, name, **labels):
    return metric(served[0], name, token=target.tokens["viewer"], **labels)


@pytest.fixture(autouse=True)
def still_right(target):
    """Whatever it was sent, it answers as before."""
    yield
    with target.stub() as stub:
        reply = stub.Label(asking(pixels(3)), metadata=target.metadata("legit"), timeout=30)
    np.testing.assert_allclose(wire.decode_answers(reply.answers[0]), direct(pixels(3)), rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- who asks


@pytest.mark.parametrize(("token", "reason"), [("", "missing"), ("guess", "unknown")])
def test_without_a_token_every_call_and_page_is_refused_and_counted(served, target, token, reason):
    before = counted(served, target, "preceptor_authentication_failures_total", reason=reason)
    assert attacking.no_token(target, token) == {"UNAUTHENTICATED": 5, "HTTP 401": 4}
    assert counted(served, target, "preceptor_authentication_failures_total", reason=reason) == before + 9


def test_a_students_token_administers_nothing_and_sees_nobody_elses(served, target):
    before = counted(served, target, "preceptor_authentication_failures_total", reason="role")
    assert attacking.student_on_admin_calls(target) == {"HTTP 403": 10}
    assert counted(served, target, "preceptor_authentication_failures_total", reason="role") == before + 10
    assert attacking.student_on_admin_calls(target, "viewer") == {"HTTP 403": 6}


def test_a_viewers_token_asks_nothing(served, target):
    assert attacking.viewer_asks(target) == {"PERMISSION_DENIED": 2}
    assert counted(served, target, "preceptor_asked_samples_total", tenant="board") == 0


def test_a_revoked_token_is_refused_at_its_next_call_on_an_open_connection(target):
    assert attacking.revoked(target) == ["OK", "UNAUTHENTICATED"]


def test_another_tenants_job_of_the_same_name_is_another_job(target):
    assert attacking.anothers_job(target) == {
        "red paid for its own": 5,
        "spend of red's job that blue sees": 0,
        "blue paid for the replay": 5,
        "red paid for blue's": 0,
        "red's id with other samples": "INVALID_ARGUMENT",
        "red's spend by its name": "HTTP 403",
    }


# ---------------------------------------------------------------- what is cached


def planted(redis, keys, kind):
    """Overwrites the entries of two samples, as who can write to the cache's Redis might."""
    names = [next(name for name in redis.keys("*") if name.endswith(key)) for key in keys]
    first, second = (redis.get(name) for name in names)
    match kind:
        case "another sample's answer":
            redis.set(names[0], second)
        case "other numbers under the old checksum":
            redis.set(names[0], first[:1] + np.full(10, 9, np.float32).tobytes() + first[41:])
        case "rubbish":
            redis.set(names[0], b"rubbish")


@pytest.mark.parametrize("kind", ["another sample's answer", "other numbers under the old checksum", "rubbish"])
def test_a_planted_answer_is_computed_anew_and_counted(tmp_path, kind):
    file = tmp_path / "tokens"
    file.touch()
    with running(tmp_path) as redis, Redis.from_url(redis.url) as cache:
        with serving(**arguments(tmp_path), tokens_file=file, cache_redis_url=redis.url) as server:
            target = attacking.Target(server.grpc_address, server.http_address, file)
            x = pixels(2, seed=11)
            with target.stub() as stub:

                def ask():
                    return stub.Label(asking(x, pb.CACHE_MODE_USE), metadata=target.metadata("student"), timeout=30)

                ask()
                until(lambda: len(cache.keys("*")) == 2)
                planted(cache, sample_keys(server.description.fingerprint, {"x": x}), kind)
                reply = ask()
            np.testing.assert_allclose(wire.decode_answers(reply.answers[0]), direct(x), rtol=1e-3, atol=1e-3)
            assert list(reply.sources) == [pb.SOURCE_COMPUTED, pb.SOURCE_CACHED]
            viewer = target.tokens["viewer"]
            assert metric(server, "preceptor_cache_errors_total", token=viewer, kind="corrupt") == 1


# ---------------------------------------------------------------- what is sent


def test_malformed_messages_are_refused_one_by_one(served, target):
    got = attacking.messages(target, attacking.mutations(1500))
    assert got.total() == 1500
    assert set(got) <= {"OK", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND", "FAILED_PRECONDITION"}
    assert got["INVALID_ARGUMENT"] > 500
    for call in ("Lookup", "Spend", "Describe"):
        got = attacking.messages(target, attacking.mutations(100, seed=1), call)
        assert set(got) <= {"OK", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND", "FAILED_PRECONDITION"}


def test_messages_that_would_grow_in_memory_are_refused_before_they_do(target):
    assert attacking.messages(target, [attacking.empty_submessages(8 * 2**20)]) == {"INVALID_ARGUMENT": 1}
    assert attacking.messages(target, [bytes(65 * 2**20)]) == {"RESOURCE_EXHAUSTED": 1}
    assert attacking.compressed(target, 32 * 2**20) == {"UNIMPLEMENTED": 1}


# ---------------------------------------------------------------- without a token


def test_probes_are_answered_and_bounded(target):
    with target.channel() as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=10) == b"\x08\x01"
        assert attacking.code(check, b"\x0a\x03xyz") == "NOT_FOUND"
        assert attacking.code(check, b"\x0a\xffxyz") == "INVALID_ARGUMENT"
    assert attacking.large_health_checks(target, 4, 2**20) == {"INVALID_ARGUMENT": 4}
    got = attacking.watchers(target, 40)
    assert got == {"OK": 16, "RESOURCE_EXHAUSTED": 24}
    until(lambda: attacking.watchers(target, 16) == {"OK": 16})  # places come back


def test_one_watcher_that_leaves_takes_nothing_from_the_others(tmp_path):
    with ExitStack() as stack:
        with serving(**arguments(tmp_path), drain_seconds=0.5) as server:
            channel = stack.enter_context(grpc.insecure_channel(server.grpc_address))
            health = health_pb2_grpc.HealthStub(channel)
            leaving, staying = (health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2))
            assert next(leaving).status == next(staying).status == health_pb2.HealthCheckResponse.SERVING
            leaving.cancel()
            health.Check(health_pb2.HealthCheckRequest(), timeout=10)  # the connection's next, so it has arrived
        assert next(staying).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_reflection_is_for_those_with_a_token(target):
    with target.channel() as channel:
        ask = attacking.reflecting(channel)
        assert attacking.code(ask, metadata=target.metadata("student")) == "OK"
        assert attacking.code(ask) == "UNAUTHENTICATED"


def test_large_headers_are_refused_on_both_ports(target):
    assert attacking.header_flood(target, 100_000) in ("HTTP 400", "closed")
    assert attacking.large_metadata(target, 100_000) == {"RESOURCE_EXHAUSTED": 1}


def test_a_flood_of_guesses_is_refused_and_logs_nothing(target, caplog):
    with attacking.Legit(target) as legit:
        assert attacking.unauthenticated(target, 500) == {"UNAUTHENTICATED": 500}
        until(lambda: len(legit.milliseconds) > 5)
    assert legit.failures == []
    assert [record.message for record in caplog.records if "BlockingIOError" not in str(record.exc_info)] == []
