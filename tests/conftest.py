"""Shared by all tests: --fail-on-skip, and a teacher server to talk to."""

import os
import signal

import pytest
import torch

from teacher_server.__main__ import main
from tests.asking import stub_at
from tests.serving import arguments, serving
from tests.spending import a_redis, fill, using

# Started in the background, a shell has us ignore SIGINT, and so would the programs that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # threads of several networks on two cores wait for one another longer than they compute


def pytest_addoption(parser):
    parser.addoption("--fail-on-skip", action="store_true", help="a skipped test fails, unless it is marked gpu")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and "gpu" not in item.keywords and item.config.getoption("--fail-on-skip"):
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running server that serves `tests.teachers:tiny`, shared by all tests: they name jobs of their own."""
    with serving(**arguments(tmp_path_factory.mktemp("server"))) as running:
        yield running


@pytest.fixture
def stub(server):
    with stub_at(server.grpc_address) as stub:
        yield stub


# ---------------------------------------------------------------- `teacher-server ledger`


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    with a_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def url(redis_url, monkeypatch):
    """An empty ledger, which the commands are given in the environment."""
    for name in [name for name in os.environ if name.startswith("TEACHER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TEACHER_LEDGER_REDIS_URL", redis_url)
    using(redis_url, lambda store: store.command("FLUSHALL"))
    return redis_url


@pytest.fixture
def ledger(url, capsys):
    """Runs `teacher-server ledger ...`; (status, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()
        status = main(["ledger", *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def full(ledger, url):
    using(url, fill)
    return ledger
