"""Replicas that share a ledger know of one another: they come, lapse, leave, and outlive their Redis."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from protos import teacher_pb2 as pb
from teacher_server.addresses import advertised, reach
from teacher_server.config import NetworkConfig
from teacher_server.registry import KEPT_SECONDS, LIVE_SECONDS, Registry
from teacher_server.store import REPLICAS_PREFIX, Store
from tests.asking import asking, metric, pixels, stub_at
from tests.ledgers import eventually
from tests.redis_servers import AOF, running
from tests.serving import arguments, free_port, process, serving, until
from tests.teachers import TINY, save, tiny


@pytest.fixture
def redis(tmp_path):
    folder = tmp_path / "redis"
    folder.mkdir()
    port = free_port()  # for servers that are processes of their own
    with running(folder, *AOF, "--port", str(port)) as server:
        server.url = f"redis://127.0.0.1:{port}"
        yield server


def replica(port, fingerprint="f" * 32, host="10.0.0.1"):
    return pb.Replica(address=f"{host}:{port}", teacher="teacher", fingerprint=fingerprint)


def addresses(registry):
    return [replica.address for replica in registry.replicas()]


@asynccontextmanager
async def registered(redis, *replicas, **options):
    """A Registry for each, on one connection; what is left is crashed."""
    async with Store(redis.url, "ledger") as store:
        registries = [Registry(store, one, **options) for one in replicas]
        for registry in registries:
            await registry.__aenter__()
        try:
            yield registries
        finally:
            for registry in registries:
                await stop(registry)


async def stop(registry):
    """What SIGKILL does."""
    registry._task.cancel()
    await asyncio.wait([registry._task])


async def when(condition):
    async def true():
        return condition()

    await eventually(true)


def test_who_comes_is_told_of_and_who_leaves_is_told_of_no_more(redis):
    async def main():
        async with registered(redis, replica(1), replica(2, "e" * 32)) as (first, second):
            await when(lambda: addresses(first) == addresses(second) == ["10.0.0.1:1", "10.0.0.1:2"])
            assert second.replicas()[1] == replica(2, "e" * 32)
            assert first.alike() == second.alike() == 1, "of its own fingerprint there is one"
            await second.__aexit__()
            assert addresses(second) == ["10.0.0.1:1"], "it says itself that it is going"
            await when(lambda: addresses(first) == ["10.0.0.1:1"])

    asyncio.run(main())


def test_who_is_heard_of_no_more_lapses_by_the_clock_of_redis(redis):
    async def main():
        async with registered(redis, replica(1), replica(2)) as (first, second):
            await when(lambda: len(first.replicas()) == 2)
            await stop(second)
            before = await first._store.command("ZSCORE", f"{REPLICAS_PREFIX}live", second._member)
            await when(lambda: len(first.replicas()) == 1)
            seconds, microseconds = map(int, await first._store.command("TIME"))
            assert float(before) <= 1000 * seconds + microseconds / 1000 <= float(before) + 1000 * LIVE_SECONDS
            assert await first._store.command("HLEN", f"{REPLICAS_PREFIX}about") == 1, "nothing of it stays"

    asyncio.run(main())


def test_who_beat_before_the_clock_of_redis_was_set_back_is_not_live_for_as_long(redis):
    async def main():
        async with registered(redis, replica(1), replica(2)) as (first, second):
            await stop(second)
            live = f"{REPLICAS_PREFIX}live"
            await first._store.command("ZINCRBY", live, "3600000", second._member)
            await first._beat()
            own, other = [await first._store.command("ZSCORE", live, one._member) for one in (first, second)]
            assert float(other) == float(own)

    asyncio.run(main())


@pytest.mark.parametrize(
    "entry",
    [
        "no JSON",
        "[]",
        '{"address": "10.0.0.9:1"}',
        '{"address": 7, "teacher": "t", "fingerprint": "f", "reach": ""}',
        '{"address": "unix:/run/theirs.sock", "teacher": "t", "fingerprint": "f", "reach": ""}',
        '{"address": "10.0.0.9", "teacher": "t", "fingerprint": "f", "reach": ""}',
    ],
)
def test_what_is_no_entry_is_left_out_and_the_others_are_told_of(redis, entry, caplog):
    async def main():
        async with registered(redis, replica(1), replica(2)) as (first, _):
            await first._store.command("HSET", f"{REPLICAS_PREFIX}about", "odd", entry)
            await first._beat()
            await first._beat()
            assert addresses(first) == ["10.0.0.1:1", "10.0.0.1:2"]
            assert "such are left out" in caplog.text

    asyncio.run(main())


def test_a_redis_that_has_lost_everything_is_told_everything_again(redis):
    now = [0.0]

    async def main():
        async with registered(redis, replica(1), replica(2), clock=lambda: now[0]) as (first, second):
            await first._beat()
            await stop(second)
            await first._store.command("DEL", f"{REPLICAS_PREFIX}live", f"{REPLICAS_PREFIX}about")
            await first._beat()
            assert await first._store.command("HLEN", f"{REPLICAS_PREFIX}about") == 1
            assert len(first.replicas()) == 2, "who has not come back yet is not taken for gone"
            await second._beat()
            assert await first._store.command("HLEN", f"{REPLICAS_PREFIX}about") == 2
            assert len(second.replicas()) == 2
            await second.__aexit__()
            await first._beat()
            assert len(first.replicas()) == 2
            now[0] = LIVE_SECONDS
            await first._beat()
            assert len(first.replicas()) == 1

    asyncio.run(main())


def test_without_redis_the_last_list_stands_for_ten_minutes(redis):
    now = [0.0]

    async def main():
        async with registered(redis, replica(1), replica(2), clock=lambda: now[0]) as (first, _):
            await when(lambda: len(first.replicas()) == 2)
            redis.kill()
            await when(lambda: first._failing)
            now[0] = KEPT_SECONDS - 1
            assert len(first.replicas()) == 2
            now[0] = KEPT_SECONDS
            assert addresses(first) == ["10.0.0.1:1"], "itself it knows to be there"
            redis.start()
            await when(lambda: len(first.replicas()) == 2)
            redis.kill()
            await first.__aexit__()  # it may always go

    asyncio.run(main())


def test_a_redis_that_takes_no_writes_is_no_reason_to_stop(redis, caplog):
    async def main():
        async with Store(redis.url, "ledger") as store:
            await store.command("CONFIG", "SET", "maxmemory", "1")
            async with Registry(store, replica(1)) as registry:
                assert addresses(registry) == ["10.0.0.1:1"]
                assert "told of no more" in caplog.text
                await store.command("CONFIG", "SET", "maxmemory", "0")
                await when(lambda: not registry._failing)

    asyncio.run(main())


def test_who_leaves_takes_nobody_along_who_has_its_address_by_now(redis):
    async def main():
        async with registered(redis, replica(1), replica(2), replica(2)) as (first, before, after):
            await stop(before)
            await after._beat()
            await before.__aexit__()
            await first._beat()
            assert addresses(first) == ["10.0.0.1:1", "10.0.0.1:2"]

    asyncio.run(main())


def test_a_loopback_address_is_told_of_on_its_own_machine_alone(redis):
    async def main():
        async with Store(redis.url, "ledger") as store:
            here, there = replica(1, host="127.0.0.1"), replica(2, host="127.0.0.1")
            async with (
                Registry(store, here, "a") as a,
                Registry(store, there, "b") as b,
                Registry(store, replica(3)) as c,
            ):
                await a._beat()
                await b._beat()
                assert addresses(a) == ["10.0.0.1:3", "127.0.0.1:1"]
                assert addresses(b) == ["10.0.0.1:3", "127.0.0.1:2"]
                assert addresses(c) == ["10.0.0.1:3"], "who asks there may be anywhere"

    asyncio.run(main())


def test_a_loopback_means_this_network_alone():
    assert reach("10.0.0.1:8001") == reach("teacher.example:8001") == ""
    assert reach("127.0.0.1:8001") == reach("localhost:1") == reach("[::1]:8001") != ""


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ({}, "127.0.0.1:9"),
        ({"host": "10.0.0.1"}, "10.0.0.1:9"),
        ({"host": "fd00::1"}, "[fd00::1]:9"),
        ({"host": "teacher.example"}, "teacher.example:9"),
        ({"host": "0.0.0.0"}, None),
        ({"host": "::"}, None),
        ({"host": "0.0.0.0", "advertise_address": "teacher.example"}, "teacher.example:9"),
        ({"host": "0.0.0.0", "advertise_address": "teacher.example:80"}, "teacher.example:80"),
        ({"host": "::", "advertise_address": "[fd00::1]"}, "[fd00::1]:9"),
        ({"host": "::", "advertise_address": "[fd00::1]:80"}, "[fd00::1]:80"),
    ],
)
def test_the_address_that_students_are_told(given, address):
    assert advertised(NetworkConfig(**given), 9) == address


@pytest.mark.parametrize("wrong", ["http://teacher", "teacher:port", "a b", "fd00::1", "", "teacher:8001/x"])
def test_an_address_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="advertise_address"):
        NetworkConfig(advertise_address=wrong)


# ---------------------------------------------------------------- servers


def described(address):
    with stub_at(address) as stub:
        return stub.Describe(pb.DescribeRequest(), timeout=10)


def shared(folder, name, redis, **given):
    """Settings of a replica of that name; each its own folder of state."""
    return {**arguments(folder), "state_directory": folder / name, "ledger_redis_url": redis.url, **given}


def test_two_fingerprints_side_by_side_each_found_by_its_own(tmp_path, redis):
    weights = save(tiny(classes=4), tmp_path / "four.safetensors", {"inputs": TINY["inputs"]})
    other = {"weights": weights, "model_arguments": {"classes": 4}}
    with serving(**shared(tmp_path, "a", redis)) as a, serving(**shared(tmp_path, "b", redis)) as b:
        with serving(**shared(tmp_path, "c", redis, **other)) as c:
            servers = (a, b, c)
            until(lambda: all(len(described(server.grpc_address).replicas) == 3 for server in servers))
            for server in servers:
                reply = described(server.grpc_address)
                assert reply.address == server.grpc_address
                assert {replica.address: replica.fingerprint for replica in reply.replicas} == {
                    server.grpc_address: server.description.fingerprint for server in servers
                }
            assert metric(a, "preceptor_replicas") == 2
            assert metric(c, "preceptor_replicas") == 1
            x = pixels(3)
            for address in (one.address for one in reply.replicas if one.fingerprint == a.description.fingerprint):
                with stub_at(address) as stub:
                    answers = stub.Label(asking(x, expected_fingerprint=a.description.fingerprint)).answers
                    assert answers[0].shape == [3, 10]
        until(lambda: len(described(a.grpc_address).replicas) == 2)


def test_a_replica_by_itself_is_told_of_nowhere(server):
    reply = described(server.grpc_address)
    assert (reply.address, len(reply.replicas)) == ("", 0)
    assert metric(server, "preceptor_replicas") == 0


def test_a_replica_that_drains_is_told_of_no_more_while_it_still_answers(tmp_path, redis):
    """Until Redis has heard of it, nobody is refused: a hanging one shows the order."""
    with serving(**shared(tmp_path, "a", redis)) as stays, process(**shared(tmp_path, "b", redis)) as (goes, at, _):
        until(lambda: len(described(stays.grpc_address).replicas) == 2)
        with stub_at(at) as stub:
            with redis.stopped():
                goes.terminate()
                until(lambda: len(described(at).replicas) == 1)
                assert stub.Label(asking(pixels(2)), timeout=10).answers[0].shape == [2, 10]
        assert goes.wait(30) == 0
        until(lambda: [one.address for one in described(stays.grpc_address).replicas] == [stays.grpc_address])
