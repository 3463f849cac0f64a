"""A Valkey of our own: it begins and ends with its server, and its files are one server's."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from teacher_server import embedded as embedded_module
from teacher_server.embedded import embedded
from teacher_server.store import (
    Store,
    capacity,
    open_ledger,
    open_stores,
)
from tests.ledgers import pid_of
from tests.redis_servers import config, ended, eventually
from tests.serving import ROOT, until


def test_both_stores_are_embedded_where_no_url_is_given(tmp_path):
    folder = tmp_path / ("long" * 30) / "state"  # longer than a socket's name may be

    async def once():
        async with open_stores(config(folder), 2**21) as stores:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            for name in ("cache", "ledger"):
                assert stat.S_IMODE((folder / name).stat().st_mode) == 0o700
                assert stat.S_IMODE((folder / name / f"{name}.sock").stat().st_mode) == 0o700
            assert await capacity(stores.cache) == 2**21
            assert stores.ledger.where == str(folder / "ledger" / "ledger.sock")
            pids = [await pid_of(store) for store in (stores.cache, stores.ledger)]
            return pids, await asyncio.gather(*(store.command("INCR", "n") for store in (stores.cache, stores.ledger)))

    for time_round in (1, 2):
        pids, counts = asyncio.run(once())
        assert counts == [1, time_round]  # the ledger keeps, the cache forgets
        assert all(ended(pid) for pid in pids)


def test_a_state_directory_has_one_server(tmp_path):
    async def main():
        async with open_stores(config(tmp_path), 2**20):
            with pytest.raises(ValueError, match=rf"state_directory: {tmp_path} is in use by .*pid {os.getpid()}\)"):
                async with open_stores(config(tmp_path), 2**20):
                    pass
        async with open_stores(config(tmp_path), 2**20):
            pass

    asyncio.run(main())


def test_a_state_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()

    async def main():
        with pytest.raises(
            OSError, match=r"state_directory: cannot use .*file/state .*Not a directory.*--state-directory"
        ):
            async with open_stores(config(tmp_path / "file" / "state"), 2**20):
                pass

    asyncio.run(main())


def test_the_command_line_reads_the_ledger_beside_a_server_and_without(tmp_path):
    async def main():
        with pytest.raises(ValueError, match="holds no ledger"):
            async with open_ledger(config(tmp_path / "none")):
                pass
        assert not (tmp_path / "none").exists()
        async with open_stores(config(tmp_path), 2**20) as stores:
            await stores.ledger.command("SET", "x", "spend")
            async with open_ledger(config(tmp_path)) as ledger:
                assert await pid_of(ledger) == await pid_of(stores.ledger)
                assert await ledger.command("GET", "x") == b"spend"
            pid = await pid_of(stores.ledger)
        async with open_ledger(config(tmp_path)) as ledger:
            assert await pid_of(ledger) != pid
            assert await ledger.command("GET", "x") == b"spend"
            with pytest.raises(ValueError, match="is in use"):
                async with open_stores(config(tmp_path), 2**20):
                    pass

    asyncio.run(main())


SERVER = """
import asyncio, sys
from pathlib import Path
from teacher_server.config import StoreConfig
from teacher_server.store import open_stores
async def main():
    async with open_stores(StoreConfig(state_directory=Path(sys.argv[1])), 2**20) as stores:
        for number in range(1000):
            await stores.ledger.command("RPUSH", "spend", number)
        print(*[(await store.info())["process_id"] for store in (stores.cache, stores.ledger)], flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


def test_killed_a_server_takes_its_stores_along_and_finds_its_ledger_again(tmp_path):
    command = [sys.executable, "-c", SERVER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        pids = [int(pid) for pid in server.stdout.readline().split()]
        assert not any(ended(pid) for pid in pids)
        server.kill()
        server.wait()

    async def at_once():  # while they may still be writing
        async with open_ledger(config(tmp_path)) as ledger:
            assert await ledger.command("LLEN", "spend") == 1000

    asyncio.run(at_once())
    until(lambda: all(ended(pid) for pid in pids))


def test_an_embedded_valkey_that_ends_is_started_again(tmp_path, caplog):
    async def main():
        async with embedded(tmp_path, "ledger", persistent=True, max_bytes=None) as url, Store(url, "ledger") as store:
            await store.command("SET", "x", 1)
            pid = await pid_of(store)
            os.kill(pid, signal.SIGKILL)
            await eventually(lambda: not store.available)
            await eventually(lambda: store.available)
            assert await store.command("GET", "x") == b"1"
            pid = await pid_of(store)
        assert ended(pid)

    asyncio.run(main())
    assert "embedded ledger: Valkey ended (-9), starting it again" in caplog.text


def test_what_valkey_says_when_it_does_not_start(tmp_path):
    async def main():
        async with open_stores(config(tmp_path), 2**20) as stores:
            await stores.ledger.command("SET", "x", 1)
        manifest = next((tmp_path / "ledger" / "appendonlydir").glob("*.manifest"))
        manifest.write_text("nonsense\n")
        with pytest.raises(OSError, match=r"(?s)embedded ledger: Valkey ended at once: .*manifest"):
            async with open_stores(config(tmp_path), 2**20):
                pass

    asyncio.run(main())


def test_without_a_valkey_to_embed(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded_module.importlib.metadata, "files", lambda name: None)

    async def main():
        with pytest.raises(OSError, match=r"\[embedded\] extra, or give --cache-redis-url and --ledger-redis-url"):
            async with open_stores(config(tmp_path), 2**20):
                pass

    asyncio.run(main())


def test_an_embedded_log_does_not_grow_forever(tmp_path):
    (tmp_path / "cache.log").write_bytes(b"x" * (2**20 + 1))

    async def main():
        async with embedded(tmp_path, "cache", persistent=False, max_bytes=2**20):
            pass

    asyncio.run(main())
    assert (tmp_path / "cache.log").stat().st_size < 2**16
    assert Path(tmp_path / "cache.lock").exists()
