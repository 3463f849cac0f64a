"""The log's bounds: how many lines, and that each is one."""

import io
import logging
import threading

import pytest

from teacher_server.logs import OneLine, RateLimit


class Log:
    """A handler as the server has it, on a clock of its own."""

    def __init__(self, **limits):
        self.now, self.stream = 0.0, io.StringIO()
        self.handler = logging.StreamHandler(self.stream)
        self.handler.addFilter(RateLimit(**limits, clock=lambda: self.now))
        self.handler.setFormatter(OneLine("%(levelname)s %(name)s: %(message)s"))

    def __call__(self, message, *args, name="a", level=logging.INFO, error=None):
        exc_info = None if error is None else (type(error), error, error.__traceback__)
        self.handler.handle(logging.LogRecord(name, level, __file__, 1, message, args, exc_info))

    @property
    def lines(self):
        return self.stream.getvalue().splitlines()


def test_beyond_the_burst_lines_are_left_out_and_the_next_says_how_many():
    log = Log(per_second=2, burst=5)
    for number in range(1000):
        log("line %d", number)
    assert log.lines == [f"INFO a: line {number}" for number in range(5)]
    log.now = 1.0
    for _ in range(10):
        log("later")
    assert log.lines[5:] == ["INFO a: later (995 lines before this one were left out)", "INFO a: later"]
    log.now = 1000.0
    for _ in range(10):
        log("much later")
    assert len(log.lines[7:]) == 5, "no more is saved up than a burst"
    assert log.lines[7] == "INFO a: much later (8 lines before this one were left out)"


def test_a_flood_of_one_logger_or_level_silences_no_other():
    log = Log(per_second=1, burst=2)
    for _ in range(100):
        log("flood", name="grpc")
    log("the device is lost", name="engine", level=logging.ERROR)
    log("more", name="grpc", level=logging.ERROR)
    assert log.lines[2:] == [
        "ERROR engine: the device is lost (98 lines before this one were left out)",
        "ERROR grpc: more",
    ]


def test_none_is_lost_from_the_count_when_threads_log_at_once():
    log = Log(per_second=1, burst=10)
    threads = [threading.Thread(target=lambda: [log("flood") for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log("at last", name="b")
    assert len(log.lines) == 11
    assert log.lines[-1] == "INFO b: at last (7990 lines before this one were left out)"


@pytest.mark.parametrize("given", ["x\nERROR a: forged", "x\r\nforged", "x\x1b[2Jforged", "x\x00\x7f"])
def test_what_a_caller_sends_cannot_begin_a_line_or_move_the_cursor(given):
    log = Log()
    log("job %s", given)
    (line,) = log.lines
    assert line.startswith("INFO a: job x\\x")
    assert line.isprintable()


def test_a_traceback_keeps_its_lines():
    log = Log()
    log("failed", error=ValueError("wrong"))
    assert log.lines[0] == "INFO a: failed"
    assert log.lines[-1] == "ValueError: wrong"
