"""The log of answers: what is in it is asked of nobody, whatever was killed, torn or rotated in between."""

import logging
import shutil
import threading
from contextlib import closing

import pytest
import torch

from protos import teacher_pb2 as pb
from student_worker import AnswerLog, Unix
from student_worker.answer import Answer
from student_worker.errors import BudgetSpent, TeacherUnavailable
from student_worker.losses import TopK
from tests.serving import until
from tests.students import CLASSES, GatedTeacher, LocalTeacher, data, generator, net

SAMPLES = torch.arange(12.0).view(3, 4)


class Whimsical(LocalTeacher):
    """Never answers the same twice."""

    def answer(self, x):
        return super().answer(x) + torch.randn(len(x), CLASSES)


class Spoken:
    """Answers one thing to everything."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def label(self, x, *, request_id, cache_mode, candidates):
        self.asked.append((request_id, cache_mode, candidates))
        return self.answer


def ask(teacher, request_id="r/1", x=SAMPLES):
    return teacher.label(x, request_id=request_id, cache_mode="bypass", candidates=4)


def pending(*ids):
    return {"pending": [{"request_id": request_id} for request_id in ids]}


DENSE = Answer(
    torch.randn(3, 10),
    ("computed", "cached", "coalesced"),
    pb.Cost(samples=1, money_nanos=5, currency="EUR"),
    (pb.Budget(owner=2, name="job", unit=1, period=1, limit=600, left=60),),
    "f" * 32,
    pb.TeacherDescription(name="t", outputs=[pb.OutputDescription(name="logits", shape=[10], top1=0.5)]),
)


def test_an_answer_is_asked_once_and_comes_back_whole(tmp_path):
    first = Spoken(DENSE)
    with AnswerLog(first, tmp_path / "log") as log:
        live = ask(log)
        assert first.asked == [("r/1", "bypass", 4)]
    second = Spoken(None)
    with AnswerLog(second, tmp_path / "log") as log:
        kept = ask(log)
        assert second.asked == []
    for answer in (live, kept):
        assert torch.equal(answer.logits, DENSE.logits)
        assert (answer.sources, answer.cost, answer.budgets) == (DENSE.sources, DENSE.cost, DENSE.budgets)
        assert (answer.fingerprint, answer.description) == (DENSE.fingerprint, DENSE.description)


def test_so_is_a_top_k_answer(tmp_path):
    logits = torch.randn(3, 1000)
    values, indices = logits.topk(5, dim=1)
    tail = 1 - (logits / 3).softmax(1).gather(1, indices).sum(1)
    with AnswerLog(Spoken(Answer(TopK(values, indices, tail, 3.0))), tmp_path / "log") as log:
        live = ask(log)
    with AnswerLog(Spoken(None), tmp_path / "log") as log:
        kept = ask(log)
    for answer in (live, kept):
        top = answer.logits
        assert torch.equal(top.values, values)
        assert torch.equal(top.indices, indices)
        assert top.indices.dtype == indices.dtype
        assert torch.equal(top.tail_mass, tail)
        assert top.temperature == 3.0


def test_other_samples_under_the_same_id_are_asked_about_and_it_is_said(tmp_path, caplog):
    teacher = Spoken(DENSE)
    with AnswerLog(teacher, tmp_path / "log") as log:
        ask(log)
        for other in (SAMPLES + 1, SAMPLES.view(4, 3), SAMPLES.double()):
            with caplog.at_level(logging.WARNING):
                ask(log, x=other)
            assert "request r/1 asks about other samples" in caplog.text
            caplog.clear()
    assert len(teacher.asked) == 4


def test_a_refusal_is_not_kept(tmp_path):
    class Refusing(Spoken):
        def label(self, x, **how):
            raise BudgetSpent("no")

    with AnswerLog(Refusing(None), tmp_path / "log") as log, pytest.raises(BudgetSpent):
        ask(log)
    teacher = Spoken(DENSE)
    with AnswerLog(teacher, tmp_path / "log") as log:
        ask(log)
    assert len(teacher.asked) == 1


def test_a_torn_end_is_cut_off_wherever_it_was_torn(tmp_path):
    path = tmp_path / "log"
    with AnswerLog(Spoken(DENSE), path) as log:
        ask(log, "r/1")
        whole = path.stat().st_size
        ask(log, "r/2")
    content = path.read_bytes()
    for size in [*range(whole, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:size])
        teacher = Spoken(DENSE)
        with AnswerLog(teacher, path) as log:
            assert path.stat().st_size == whole
            for _ in range(2):
                ask(log, "r/1")
                ask(log, "r/2")
        assert [request_id for request_id, *_ in teacher.asked] == ["r/2"]
        assert path.read_bytes() == content


@pytest.mark.parametrize("place", [-1, -200, 30])
def test_a_damaged_record_ends_the_log(tmp_path, place, caplog):
    path = tmp_path / "log"
    with AnswerLog(Spoken(DENSE), path) as log:
        ask(log)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    teacher = Spoken(DENSE)
    with AnswerLog(teacher, path) as log:
        assert torch.equal(ask(log).logits, DENSE.logits)
    assert len(teacher.asked) == 1
    assert "no whole record" in caplog.text


@pytest.mark.parametrize("content", [b"", b"preceptor answers 2\n", b"PK\3\4 something else"])
def test_another_versions_or_another_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no log of answers that this program reads"):
        AnswerLog(Spoken(DENSE), path)
    assert path.read_bytes() == content


def test_rotation_keeps_what_is_pending_and_nothing_else(tmp_path):
    teacher = Spoken(DENSE)
    with AnswerLog(teacher, tmp_path / "log") as log:
        for number in range(6):
            ask(log, f"r/{number}")
        log.rotate(pending("r/2", "r/5", "r/6"))  # r/6 has not been answered yet
        small = (tmp_path / "log").stat().st_size
        ask(log, "r/6")
        ask(log, "r/2")
        assert len(teacher.asked) == 7
    with AnswerLog(teacher, tmp_path / "log") as log:
        for number in (2, 5, 6):
            ask(log, f"r/{number}")
        assert len(teacher.asked) == 7
        for number in (0, 1, 3, 4):
            ask(log, f"r/{number}")
        assert len(teacher.asked) == 11
        log.rotate(pending())
        assert (tmp_path / "log").stat().st_size < small


def test_what_comes_after_close_is_not_kept(tmp_path):
    teacher = GatedTeacher()
    log = AnswerLog(teacher, tmp_path / "log")
    errors = []

    def late():
        try:
            ask(log, x=torch.randn(3, 12))
        except TeacherUnavailable as error:
            errors.append(str(error))

    thread = threading.Thread(target=late)
    thread.start()
    assert teacher.begun.acquire(timeout=30)
    before = (tmp_path / "log").read_bytes()
    log.close()
    teacher.gate.set()
    thread.join(30)
    assert errors == ["this log of answers is closed"]
    assert (tmp_path / "log").read_bytes() == before


def run(unix, loader, student, after):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)  # without momentum, which a state would have to hold
    with closing(unix.batches(loader, student, depth=3)) as batches:
        for b in batches:
            unix.criterion(student(b.x), b).backward()
            optimizer.step()
            optimizer.zero_grad()
            after()


def test_killed_after_any_step_before_or_after_its_rotation_every_answer_is_there(tmp_path):
    """Three answers arrive in threads while the log is rotated at each step; the files of each moment are kept.

    The teacher answers at random, so a run goes on as the first did only if it gets the first one's answers: those
    that were there. What had not come yet at a moment is not compared.
    """
    xs, student, moments = data(12), net(1), []
    log = AnswerLog(Whimsical(), tmp_path / "log")
    unix = Unix(log, generator=generator())

    def snapshot(state):
        copy = tmp_path / f"moment-{len(moments)}"
        shutil.copy(tmp_path / "log", copy)
        moments.append((copy, state))

    def state():
        return {"unix": unix.state_dict(), "student": {k: v.clone() for k, v in student.state_dict().items()}}

    weights = []
    last = state()

    def after():
        nonlocal last
        weights.append(student[1].weight.clone())
        snapshot(last)  # killed before the new state is in its place
        last = state()
        snapshot(last)  # and before the rotation
        log.rotate(last["unix"])
        snapshot(last)  # and after it

    run(unix, xs, student, after)
    log.close()
    assert len(moments) == 36
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("unix")])
    compared = 0
    for number, (copy, state) in enumerate(moments):
        steps = state["unix"]["steps"]
        resumed = net(2)
        resumed.load_state_dict(state["student"])
        with AnswerLog(Whimsical(), copy) as again:
            known = set(again._places)
            other = Unix(again, generator=generator(5))
            other.load_state_dict(state["unix"])
            answered = 0
            while f"{state['unix']['run']}/{steps + answered}" in known:
                answered += 1
            seen = []
            run(other, xs[steps:], resumed, lambda: seen.append(resumed[1].weight.clone()))  # noqa: B023
        assert len(seen) == len(xs) - steps
        for step in range(answered):
            assert torch.equal(seen[step], weights[steps + step])
        assert answered or number % 3  # what a step had used is there before the next state is
        compared += answered
    assert compared >= 12
