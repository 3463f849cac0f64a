"""docs/operations.md: a ledger is backed up, lost with its Redis, and put back, by the commands that stand there."""

import os
import re
import shlex
import shutil
import subprocess
import time
from contextlib import ExitStack

import pytest
from redis import Redis

from student_worker import TeacherClient
from teacher_server.__main__ import main
from teacher_server.embedded import valkey_binary
from tests.asking import get, metric, pixels
from tests.redis_servers import RedisServer
from tests.serving import ROOT, arguments, free_port, serving, until

OPERATIONS = (ROOT / "docs/operations.md").read_text()
pytestmark = pytest.mark.skipif(not shutil.which("redis-cli"), reason="no redis-cli; apt-get install redis-tools")


def block(holding):
    """The commands of the one block that has this one among them."""
    blocks = re.findall(r"^```\n(.*?)^```$", OPERATIONS, re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if holding in block)
    return [line.removeprefix("$ ") for line in found.splitlines()]


class Machine:
    """Runs the page's commands with folders and a port of the test's own."""

    def __init__(self, folder, ending):
        self._ending = ending
        self.redis = None
        self.files, self.backup = folder / "redis", folder / "backup"
        self.files.mkdir()
        self.backup.mkdir()
        self._port = free_port()
        self.url = f"redis://127.0.0.1:{self._port}"
        self.settings = arguments(folder) | {"state_directory": folder / "state", "ledger_redis_url": self.url}

    def run(self, lines):
        for line in lines:
            here = line.replace("/backup", str(self.backup)).replace("/var/lib/redis", str(self.files))
            words = shlex.split(here.replace("6379", str(self._port)))
            if words[0] == "redis-server":
                quiet = ["--save", "", "--bind", "127.0.0.1", "--loglevel", "warning"]
                self.redis = RedisServer(self.url, self.files, [valkey_binary(), *words[1:], *quiet])
                self._ending.callback(self.redis.kill)
            elif words[0] == "teacher-server":
                assert main(words[1:]) == 0, line
            else:
                subprocess.run(["bash", "-c", here], check=True, capture_output=True, timeout=30)
                if "appendonly yes" in line:
                    with Redis.from_url(self.url) as redis:
                        until(lambda: not redis.info("persistence")["aof_rewrite_in_progress"])

    def lose_redis(self):
        self.redis.kill()
        shutil.rmtree(self.files)
        self.files.mkdir()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("TEACHER_")]:
        monkeypatch.delenv(name)
    with ExitStack() as ending:
        machine = Machine(tmp_path, ending)
        monkeypatch.setenv("TEACHER_LEDGER_REDIS_URL", machine.url)
        yield machine


def ask(server, samples, seed):
    with TeacherClient(server.grpc_address, job="run") as student:
        student.label(pixels(samples, seed=seed), cache_mode="bypass")


def booked(server):
    """Once this replica's books are in the ledger."""
    return get(server, "/v1/spend")


def charged(capsys):
    capsys.readouterr()
    assert main(["ledger", "verify"]) == 0
    return int(re.search(r"charged (\d+)", capsys.readouterr().out)[1])


def test_with_the_replicas_stopped_their_journals_have_what_came_after_the_backup(machine, capsys):
    restore = block("ledger restore /backup/ledger.json")
    machine.run(restore[:1])
    with serving(**machine.settings) as server:
        main(["ledger", "budget", "default", "run", "--samples", "500"])
        ask(server, 100, seed=1)
        booked(server)
        machine.run(block("ledger export"))
        main(["ledger", "budget", "default", "run", "--remove", "samples"])
        ask(server, 60, seed=2)
        booked(server)
        machine.lose_redis()
        ask(server, 18, seed=3)
    machine.run(restore)
    assert charged(capsys) == 100
    with serving(**machine.settings) as server:
        booked(server)
        assert charged(capsys) == 178
        main(["ledger", "budget"])
        assert re.search(r"default +run +500 samples in all +178 samples", capsys.readouterr().out)


def test_under_replicas_that_run_on_what_is_lost_is_told_to_the_sample(machine, capsys):
    machine.run(block("ledger restore /backup/ledger.json")[:1])
    with serving(**machine.settings) as server, Redis.from_url(machine.url) as redis:
        ask(server, 100, seed=1)
        booked(server)
        machine.run(block("--rdb"))
        ask(server, 60, seed=2)
        booked(server)
        now = time.time()
        until(lambda: float(redis.get("preceptor:ledger:1:on-disk") or 0) > now)  # so it is not kept for a repetition
        machine.lose_redis()
        ask(server, 18, seed=3)
        machine.run(block("cp /backup/ledger.rdb"))
        until(lambda: metric(server, "preceptor_store_up", store="ledger"))
        booked(server)
        names = ("forwarded_samples_total", "ledger_forwarded_samples", "ledger_pending_samples")
        forwarded, taken, pending = (metric(server, f"preceptor_{name}") for name in names)
        lost = forwarded - taken - pending
        assert charged(capsys) == 178 - lost
        main(["ledger", "show", "--audit"])
        assert ("postings lost by Redis" in capsys.readouterr().out) == (lost > 0)
        assert lost in (0, 60)  # 0 where Redis had said that it is on the disk just before the posting
