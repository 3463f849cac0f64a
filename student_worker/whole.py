"""One answer from those to a query's parts."""

import threading
from concurrent.futures import Future
from functools import partial

from student_worker.answer import Answer, concatenated
from student_worker.errors import TeacherUnavailable


class Whole:
    """The answer to a query of several parts: theirs in order, or the first error; then the other parts are dropped."""

    def __init__(self, parts: int) -> None:
        self.future: Future[Answer] = Future()
        self._answers: list[Answer | None] = [None] * parts
        self._parts: list[Future[Answer]] = []
        self._settled = False
        self._lock = threading.Lock()  # never held while a future's callbacks run: they may come back here
        self.future.add_done_callback(partial(_drop, self._parts))

    def add(self, number: int, part: "Future[Answer]") -> None:
        self._parts.append(part)
        part.add_done_callback(partial(self._done, number))

    def fail(self, error: BaseException) -> None:
        if self._settle():
            self.future.set_exception(error)

    def _done(self, number: int, part: "Future[Answer]") -> None:
        if part.cancelled():
            self.fail(TeacherUnavailable("this client is closed"))
        elif (error := part.exception()) is not None:
            self.fail(error)
        else:
            with self._lock:
                self._answers[number] = part.result()
                answers = [answer for answer in self._answers if answer is not None]
            if len(answers) == len(self._answers):
                whole = concatenated(answers)
                if self._settle():
                    self.future.set_result(whole)

    def _settle(self) -> bool:
        """True for the first who may set the future's outcome; never once its owner has cancelled it."""
        with self._lock:
            first, self._settled = not self._settled, True
        return first and self.future.set_running_or_notify_cancel()


def _drop(parts: "list[Future[Answer]]", _: "Future[Answer]") -> None:
    """Cancels what has not begun, and lets go of the rest: parts know their whole, and answers are large."""
    for part in list(parts):
        part.cancel()
    parts.clear()
