"""Shared by all tests: --fail-on-skip, and a teacher server to talk to."""

import signal

import pytest
import torch

from tests.asking import stub_at
from tests.serving import arguments, serving

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
