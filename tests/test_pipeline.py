"""One connection for all callers, on real servers: the bundled Valkey, and Debian's Redis where it is installed."""

import asyncio
import logging
import shutil
import subprocess
import time
from contextlib import AsyncExitStack

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from teacher_server.store import (
    Store,
    StoreUnavailable,
)
from tests.redis_servers import AOF, DEBIAN, eventually, needs_debian, running
from tests.serving import free_port, until

SECRET = "s3cret:/word"  # noqa: S105


@pytest.fixture(scope="module")
def valkey(tmp_path_factory):
    """One that keeps nothing, shared by the tests that do it no harm."""
    with running(tmp_path_factory.mktemp("valkey")) as server:
        yield server


# ---------------------------------------------------------------- one connection, many callers


def test_each_of_many_callers_gets_its_own_reply(valkey):
    async def main():
        async with Store(valkey.url, "cache") as store:

            async def caller(number):
                for step in range(20):
                    value = f"{number}/{step}".encode() * (1 + number % 7)
                    assert await store.command("SET", f"own/{number}", value) == b"OK"
                    assert await store.command("GET", f"own/{number}") == value

            await asyncio.gather(*(caller(number) for number in range(300)))

    asyncio.run(main())


def test_numbers_text_and_bytes_travel_as_they_are(valkey):
    async def main():
        async with Store(valkey.url, "cache") as store:
            parts = ("RPUSH", "parts", b"\x00\r\n\xff", "é", 7, 0.1, "")
            await store.command(*parts)
            assert await store.command("LRANGE", "parts", 0, -1) == [b"\x00\r\n\xff", "é".encode(), b"7", b"0.1", b""]
            with pytest.raises(TypeError):
                await store.command("SET", "parts", None)
            assert await store.command("GET", "nothing") is None

    asyncio.run(main())


def test_more_than_one_pipeline_holds_goes_out_in_several(valkey):
    async def main():
        async with Store(valkey.url, "cache") as store:
            large = bytes(3 * 2**20)
            replies = await asyncio.gather(
                *(store.command("SET", f"large/{number}", large) for number in range(8)),
                *(store.command("ECHO", number) for number in range(5000)),
            )
            assert replies == [b"OK"] * 8 + [str(number).encode() for number in range(5000)]
            assert await store.command("GET", "large/7") == large
            await store.command("DEL", *(f"large/{number}" for number in range(8)))

    asyncio.run(main())


def test_an_error_is_its_own_commands_alone(valkey):
    async def main():
        async with Store(valkey.url, "cache") as store:
            before, error, after = await asyncio.gather(
                store.command("SET", "word", "x"),
                store.command("INCR", "word"),
                store.command("GET", "word"),
                return_exceptions=True,
            )
            assert (before, after) == (b"OK", b"x")
            assert isinstance(error, ResponseError)
            assert "not an integer" in str(error)

    asyncio.run(main())


def test_a_cancelled_caller_disturbs_nobody(valkey):
    async def main():
        async with Store(valkey.url, "cache") as store:
            with valkey.stopped():  # so that these stay under way
                flying = [asyncio.create_task(store.command("ECHO", number)) for number in range(10)]
                await eventually(lambda: len(store._under_way) == 10)
                waiting = [asyncio.create_task(store.command("RPUSH", "unsent", number)) for number in range(10)]
                await eventually(lambda: len(store._asked) == 10)
                flying[3].cancel()
                waiting[3].cancel()
                await asyncio.wait([flying[3], waiting[3]])
            echoed = await asyncio.gather(*flying, return_exceptions=True)
            assert echoed[:3] + echoed[4:] == [b"%d" % number for number in range(10) if number != 3]
            await asyncio.gather(*waiting, return_exceptions=True)
            assert await store.command("LRANGE", "unsent", 0, -1) == [b"%d" % n for n in range(10) if n != 3]

    asyncio.run(main())


def test_a_script_runs_once_though_redis_forgets_it(valkey):
    async def main():
        async with Store(valkey.url, "ledger") as store:
            text = "return {redis.call('INCRBY', ARGV[1], ARGV[2]), ARGV[1]}"
            assert await store.script(text, "counter", 2) == [2, b"counter"]
            assert await store.script(text, "counter", 2) == [4, b"counter"]
            await store.command("SCRIPT", "FLUSH")
            replies = await asyncio.gather(*(store.script(text, "counter", 1) for _ in range(50)))
            assert [count for count, _ in replies] == list(range(5, 55))
            with pytest.raises(ResponseError, match="my own"):
                await store.script("return redis.error_reply('MINE my own')")

    asyncio.run(main())


def test_a_command_that_blocks_holds_up_nobody(valkey):
    async def main():
        async with Store(valkey.url, "ledger") as store:
            blocked = asyncio.create_task(store.apart(("PING",), ("BLPOP", "list", 30), within=30))
            while b"cmd=blpop" not in await store.command("CLIENT", "LIST"):  # noqa: ASYNC110 - it is Redis that tells
                await asyncio.sleep(0.005)
            await store.command("RPUSH", "list", "x")
            assert await blocked == [b"PONG", [b"list", b"x"]]
            with pytest.raises(ResponseError):
                await store.apart(("PING",), ("NO-SUCH",), ("NO-SUCH",), within=1)
            with pytest.raises(TypeError):
                await store.apart((None,), within=1)

    asyncio.run(main())


# ---------------------------------------------------------------- when Redis is gone


def test_a_killed_redis_fails_at_once_and_returns_with_its_data(tmp_path, caplog):
    async def main():
        with running(tmp_path, *AOF) as server:
            async with Store(server.url, "ledger") as store:
                await store.command("SET", "kept", "x")
                first = store.connected_since
                with server.stopped():
                    flying = [asyncio.create_task(store.command("PING")) for _ in range(10)]
                    await eventually(lambda: len(store._under_way) == 10)
                    waiting = asyncio.create_task(store.command("PING"))
                    await eventually(lambda: store._asked)
                    server.kill()
                    failed = await asyncio.gather(*flying, waiting, return_exceptions=True)
                assert {type(error) for error in failed} == {StoreUnavailable}
                assert not store.available
                begin = time.perf_counter()
                for _ in range(100):
                    with pytest.raises(StoreUnavailable, match="ledger: no answer from"):
                        await store.command("GET", "kept")
                    with pytest.raises(StoreUnavailable):
                        await store.apart(("PING",), within=1)
                assert time.perf_counter() - begin < 1  # 200 refusals; one connect timeout alone is a second
                server.start()
                await eventually(lambda: store.available)
                assert await store.command("GET", "kept") == b"x"
                assert store.connected_since > first
            with pytest.raises(StoreUnavailable):
                await store.command("PING")

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    gone, back = (record.getMessage() for record in caplog.records if record.name.startswith("teacher_server"))
    assert "is gone" in gone
    assert "answers again" in back


def test_that_redis_has_gone_is_found_out_before_anyone_asks(tmp_path):
    async def main():
        with running(tmp_path) as server:
            async with Store(server.url, "cache") as store:
                server.kill()
                await eventually(lambda: not store.available)

    asyncio.run(main())


def test_a_redis_that_is_silent_counts_as_gone(tmp_path):
    async def main():
        with running(tmp_path) as server:
            async with Store(server.url, "cache") as store:
                with server.stopped():
                    begin = time.perf_counter()
                    with pytest.raises(StoreUnavailable, match="silent for 2 s"):
                        await store.command("PING")
                    assert 1.9 < time.perf_counter() - begin < 4
                    with pytest.raises(StoreUnavailable):
                        await store.command("PING")
                await eventually(lambda: store.available)
                assert await store.command("PING") == b"PONG"

    asyncio.run(main())


def test_a_redis_that_is_slow_is_not_silent(valkey, monkeypatch):
    monkeypatch.setattr("teacher_server.pipeline.SILENCE_SECONDS", 0.5)

    async def main():
        async with Store(valkey.url, "cache") as store:  # one pipeline, whose replies come one after another
            assert await asyncio.gather(*(store.command("BLPOP", "nothing", 0.2) for _ in range(5))) == [None] * 5

    asyncio.run(main())


def test_leaving_with_commands_under_way_lets_go_of_their_callers(valkey):
    async def main():
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(Store(valkey.url, "cache"))
            with valkey.stopped():
                flying = asyncio.create_task(store.command("PING"))
                await eventually(lambda: store._under_way)
                await stack.aclose()
                with pytest.raises(StoreUnavailable, match="closed"):
                    await flying

    asyncio.run(main())


# ---------------------------------------------------------------- where Redis is, and who may


def test_nobody_there(tmp_path):
    async def main():
        port = free_port()
        with pytest.raises(OSError, match=rf"cache: no answer from redis://127.0.0.1:{port}/2 .*--cache-redis-url"):
            async with Store(f"redis://:hush@127.0.0.1:{port}/2", "cache"):
                pass
        with pytest.raises(OSError, match=rf"ledger: no answer from {tmp_path}/none\.sock"):
            async with Store(f"unix://{tmp_path}/none.sock", "ledger"):
                pass

    asyncio.run(main())


def test_a_redis_that_cannot_write_to_its_disk(tmp_path):
    """It refuses PING too. Here its snapshot cannot be put in place, which is an error for root as well."""

    async def open_it(url):
        async with Store(url, "ledger"):
            pass

    with running(tmp_path, "--save", "3600 1") as redis:
        (tmp_path / "dump.rdb").mkdir()
        with Redis.from_url(redis.url) as client:
            client.bgsave()
            until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        with pytest.raises(OSError, match=r"MISCONF.*; it cannot write to its disk: make room there"):
            asyncio.run(open_it(redis.url))


@pytest.mark.parametrize(
    "url",
    [
        "http://:PASS@host:6379",
        "PASS",
        "redis://:PASS#word@host:6379",
        "redis://user:PASS/word@host:6379",
        "redis://user:12PASS?word@host:6379",
        "redis://user:12#PASS@host:6379",
        "redis://user:PASS@host:notaport",
        "redis://:PASS",
        "redis://:PASS@host/notadatabase",
        "redis://:PASS@host?unknown=option",
        "redis://:PASS@",
        "unix://:PASS@",
        "unix://:PASS/word@/path",
    ],
)
def test_a_url_that_is_misread_is_not_repeated(url):
    with pytest.raises(ValueError, match="ledger_redis_url: not understood; write redis://") as caught:
        Store(url, "ledger")
    assert "PASS" not in str(caught.value).replace("PASSWORD", "")


def test_a_password_is_used_and_never_shown(tmp_path):
    quoted = SECRET.replace(":", "%3A").replace("/", "%2F")
    port = free_port()

    async def main():
        with running(tmp_path, "--port", str(port), "--requirepass", SECRET) as server:
            path = server.url.removeprefix("unix://")
            for url in (f"redis://:{quoted}@127.0.0.1:{port}/1", f"unix://:{quoted}@{path}?db=1"):
                async with Store(url, "ledger") as store:
                    assert await store.command("PING") == b"PONG"
                    assert "s3cret" not in store.where
                    assert b" db=1 " in await store.command("CLIENT", "INFO")
            for url in (
                f"redis://:{quoted}x@127.0.0.1:{port}",
                f"redis://127.0.0.1:{port}",
                f"unix://me:{quoted}@{path}",
            ):
                with pytest.raises(OSError, match=r"ledger: .* password .*_LEDGER_REDIS_URL") as caught:
                    async with Store(url, "ledger"):
                        pass
                assert "s3cret" not in str(caught.value)

    asyncio.run(main())


@needs_debian
@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_tls(tmp_path):
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *names], cwd=tmp_path, check=True, capture_output=True)
    port = free_port()
    files = ("--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem", "--tls-ca-cert-file", "cert.pem")

    async def main():
        options = ("--tls-port", str(port), "--tls-auth-clients", "no", *files)
        with running(tmp_path, *options, binary=DEBIAN):
            async with Store(f"rediss://localhost:{port}?ssl_ca_certs={tmp_path}/cert.pem", "cache") as store:
                assert await store.command("PING") == b"PONG"
                assert store.where == f"rediss://localhost:{port}/0"
            with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
                async with Store(f"rediss://localhost:{port}", "cache"):
                    pass

    asyncio.run(main())
