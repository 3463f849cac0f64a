"""The student's side of Preceptor: `from student_worker import TeacherClient, Unix`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from student_worker.answer import Answer, Lookup
    from student_worker.answer_log import AnswerLog
    from student_worker.client import TeacherClient
    from student_worker.metrics import Metrics
    from student_worker.unix import Distilled, Unix

__all__ = ["Answer", "AnswerLog", "Distilled", "Lookup", "Metrics", "TeacherClient", "Unix"]

_HOMES = {
    "Answer": "answer", "AnswerLog": "answer_log", "Lookup": "answer", "Metrics": "metrics", "TeacherClient": "client",
    "Distilled": "unix", "Unix": "unix",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports on first use: the command line must answer --help before torch has loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
