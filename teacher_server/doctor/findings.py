"""What a check says: one line, and under it what to do where something is to be done."""

from collections.abc import Iterable
from typing import Literal, NamedTuple, TextIO

Level = Literal["ok", "note", "problem"]
_LEVEL_WIDTH, _CHECK_WIDTH = 9, 13


class Finding(NamedTuple):
    level: Level
    """problem: it will not be served, or not as it should be. note: it will, but look at this."""
    check: str
    said: str
    fix: str = ""
    """For all but ok."""


def ok(check: str, said: str) -> Finding:
    return Finding("ok", check, said)


def note(check: str, said: str, fix: str) -> Finding:
    return Finding("note", check, said, fix)


def problem(check: str, said: str, fix: str) -> Finding:
    return Finding("problem", check, said, fix)


def from_error(check: str, error: BaseException | str, fix: str, level: Level = "problem") -> Finding:
    """Of an error or a warning of ours, which say what to do behind their last semicolon; `fix` where one does not."""
    said, found, advice = str(error).rpartition("; ")
    return Finding(level, check, said, advice) if found else Finding(level, check, str(error), fix)


def tell(findings: Iterable[Finding], output: TextIO) -> int:
    """Prints each as soon as it is known; the exit status, 1 where there is a problem."""
    counts = {"ok": 0, "note": 0, "problem": 0}
    for level, check, said, fix in findings:
        counts[level] += 1
        output.write(f"{level:{_LEVEL_WIDTH}}{check:{_CHECK_WIDTH}}{_one_line(said)}\n")
        if level != "ok":
            output.write(f"{'':{_LEVEL_WIDTH + _CHECK_WIDTH}}fix: {_one_line(fix)}\n")
        output.flush()
    problems, notes = counts["problem"], counts["note"]
    output.write(f"\n{counts['ok']} ok, {_many(notes, 'note')}, {_many(problems, 'problem')}\n")
    return 1 if problems else 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
