"""Lines on standard error: what they look like, that nobody waits for who reads them, that a flood is counted."""

import io
import json
import logging
import os
import re
import threading
import warnings
from contextlib import suppress
from contextvars import copy_context
from functools import partial

import pytest

from teacher_server.log_lines import logging_to
from teacher_server.logs import Flood
from teacher_server.trails import Trail, concern
from tests.serving import until

log = logging.getLogger("tests.logs")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_loggers_events_are_one_line_of_json_each():
    stream = io.StringIO()
    with logging_to(stream):
        log.info("%d of %s", 3, "four", extra={"tenant": "red"})
        logging.getLogger("uvicorn.error").warning("odd\nrequest")
        logging.getLogger("uvicorn.error").info("Started server process")
        logging.getLogger("grpc._cython.cygrpc").error("unexpected")
        log.error("it failed", exc_info=ValueError("no\nway"))
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", stacklevel=1)
    first, odd, unexpected, failed, warned = lines(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {"level": "INFO", "logger": "tests.logs", "message": "3 of four", "tenant": "red"}
    assert (odd["logger"], odd["message"]) == ("uvicorn.error", "odd\nrequest")
    assert unexpected["logger"] == "grpc._cython.cygrpc"
    assert failed["exc_info"] == "ValueError: no\nway"
    assert "old" in warned["message"]


def test_a_terminal_gets_text():
    stream = Terminal()
    with logging_to(stream):
        log.info("hello", extra={"tenant": "red", "samples": 3})
    assert re.fullmatch(r"[-0-9]{10} [0-9:,]{12} INFO tests\.logs: hello tenant=red samples=3\n", stream.getvalue())


@pytest.mark.parametrize("given", ["x\nERROR a: forged", "x\r\nforged", "x\x1b[2Jforged", "x\x00\x7f\x9b"])
def test_what_a_caller_sends_cannot_begin_a_line_or_move_the_cursor(given):
    stream = Terminal()
    with logging_to(stream):
        log.info("job %s", given, extra={"job": given})
        log.error("failed", exc_info=ValueError("of more\nlines"))
    line, failed, *traceback = stream.getvalue().splitlines()
    assert "INFO tests.logs: job x\\x" in line
    assert line.isprintable()
    assert failed.endswith("failed")
    assert traceback == ["ValueError: of more", "lines"]


def about(say, message, *whom):
    """Says it where what is logged concerns them."""

    def concerning():
        concern(*whom)
        say(message)

    copy_context().run(concerning)


def test_a_line_names_the_traces_that_its_context_is_about():
    stream, one, two = io.StringIO(), Trail(), Trail()
    with logging_to(stream):
        about(log.info, "one", one)
        about(log.info, "both", one, "no trace", two, one)
        about(partial(log.info, extra={"trace_id": "x"}), "its own", one)
        log.info("none")
    first, both, own, none = lines(stream)
    assert first["trace_id"] == one.mark.trace_id
    assert both["trace_ids"] == [one.mark.trace_id, two.mark.trace_id]
    assert own["trace_id"] == "x"
    assert not {"trace_id", "trace_ids"} & none.keys()


def test_nobody_who_logs_waits_for_who_reads():
    """A pipe that nobody reads takes 64 KiB; what comes then waits, and beyond 10,000 lines it is counted."""
    reading, writing = os.pipe()
    done = threading.Event()

    def call():
        for _ in range(12_000):
            log.info("x" * 100, extra={"code": "OK"})
        done.set()

    with os.fdopen(writing, "w") as stream, os.fdopen(reading) as reader:
        with logging_to(stream):
            caller = threading.Thread(target=call)
            caller.start()
            assert done.wait(30)
            caller.join()
            written = []
            rest = threading.Thread(target=lambda: written.extend(reader), daemon=True)
            rest.start()
            until(lambda: any("left out" in line for line in written))
        stream.close()
        rest.join(30)
    (complaint,) = [json.loads(line)["message"] for line in written if "left out" in line]
    said = re.fullmatch(r"(\d+) lines left out: whoever reads them is slower than we write", complaint)
    assert len(written) - 1 + int(said[1]) == 12_000


def test_a_reader_that_has_gone_harms_nobody():
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    with logging_to(stream):
        for _ in range(100):
            log.warning("nobody reads this")
    with suppress(BrokenPipeError):  # what it still holds
        stream.close()


def test_arguments_that_do_not_fit_are_said_to(capsys):
    stream = io.StringIO()
    with logging_to(stream):
        log.info("%d", 1)
        log.info("fine", extra={"odd": object})
    assert [line["message"] for line in lines(stream)] == ["1", "fine"]
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- floods


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def record(message="no", *arguments, **fields):
    made = logging.LogRecord("server", logging.WARNING, __file__, 1, message, arguments, None)
    made.__dict__.update(fields)
    return made


def test_a_flood_is_cut_and_counted(clock):
    flood = Flood(3, 10, clock=clock)
    assert [flood.filter(record("no %d", i)) for i in range(5)] == [True, True, True, False, False]
    assert flood.filter(record("something else"))
    assert flood.left_out() == []  # it may go on
    clock.now = 11.0
    (said,) = flood.left_out()
    assert (said.getMessage(), said.left_out, said.levelname) == (
        "2 more lines left out, like this: no %d",
        2,
        "WARNING",
    )
    assert flood.left_out() == []
    assert flood.filter(record("no %d", 6))


def test_calls_that_went_well_are_no_flood_and_refusals_are_one_a_tenant_and_code(clock):
    flood = Flood(1, 10, clock=clock)
    assert all(flood.filter(record("call", code="OK", tenant="red")) for _ in range(10))
    assert all(flood.filter(record("request", code=200, tenant="red")) for _ in range(10))
    assert flood.filter(record("call", code="UNAUTHENTICATED", tenant=""))
    assert not flood.filter(record("call", code="UNAUTHENTICATED", tenant=""))
    assert flood.filter(record("call", code="RESOURCE_EXHAUSTED", tenant="red"))
    assert flood.filter(record("call", code="RESOURCE_EXHAUSTED", tenant="blue"))
    assert flood.filter(record("request", code=404, tenant=""))
    (said,) = flood.left_out(all_of_it=True)
    assert (said.code, said.tenant, said.left_out) == ("UNAUTHENTICATED", "", 1)


def test_none_is_lost_from_the_count_when_threads_log_at_once(clock):
    flood = Flood(10, 10, clock=clock)
    through = []
    threads = [
        threading.Thread(target=lambda: through.extend([flood.filter(record()) for _ in range(2000)])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (said,) = flood.left_out(all_of_it=True)
    assert (sum(through), said.left_out) == (10, 7990)


def test_who_makes_up_kinds_of_lines_fills_one_kind_and_no_memory(clock):
    flood = Flood(1, 10, clock=clock)
    through = sum(flood.filter(record(f"no {i}")) for i in range(1000))
    assert through == 201
    (said,) = flood.left_out(all_of_it=True)
    assert said.getMessage() == "799 more lines left out, of many kinds"
    clock.now = 11.0
    assert flood.filter(record("new"))


def test_what_was_left_out_is_told_when_logging_ends():
    stream = io.StringIO()
    with logging_to(stream):
        for i in range(1000):
            log.warning("bad request %d", i)
    said = lines(stream)
    assert len(said) == 51
    assert said[-1]["left_out"] == 950
    assert said[-1]["message"] == "950 more lines left out, like this: bad request %d"
