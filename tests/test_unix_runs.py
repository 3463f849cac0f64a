"""A run of UNIX: queries in flight, stopping and going on, a teacher that fits, and refusals."""

import io
import math
import threading
from contextlib import closing
from itertools import islice

import pytest
import torch
from torch import nn

from protos import teacher_pb2 as pb
from student_worker.errors import InvalidQuery, TeacherMisunderstands, TeacherUnavailable
from student_worker.unix import Unix
from tests.serving import until
from tests.students import (
    CLASSES,
    FEATURES,
    GatedTeacher,
    LocalTeacher,
    TopKTeacher,
    Watched,
    data,
    generator,
    net,
    train,
)

# ---------------------------------------------------------------- queries in flight


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_lag(depth):
    unix = Unix(LocalTeacher())
    lags = []
    train(unix, data(7), net(1), depth, after=lambda b: lags.append(b.lag))
    assert lags == [min(step, depth) for step in range(7)]


def test_selection_is_as_old_as_the_lag_says():
    """The student that scores batch i has taken max(0, i - depth) steps."""
    for depth in (0, 2):
        student = net(1)
        versions = []

        class Recorder(nn.Module):
            def __init__(self, student, versions):
                super().__init__()
                self.student, self.versions = student, versions

            def forward(self, x):
                if not torch.is_grad_enabled():
                    self.versions.append(self.student[1].weight.clone())
                return self.student(x)

        weights = [student[1].weight.clone()]
        train(
            Unix(LocalTeacher()),
            data(6),
            Recorder(student, versions),
            depth,
            after=lambda b, student=student, weights=weights: weights.append(student[1].weight.clone()),
        )
        for i, scored_by in enumerate(versions):
            assert torch.equal(scored_by, weights[max(0, i - depth)])


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("unix")]


@pytest.fixture(autouse=True)
def no_thread_stays():
    """Nobody waits for them, but every thread ends with its last call."""
    yield
    until(lambda: not threads())


def test_depth_queries_are_in_flight_while_the_student_learns():
    teacher = GatedTeacher()
    teacher.gate.set()
    with closing(Unix(teacher).batches(data(10), net(1), depth=3)) as batches:
        next(batches)
        for _ in range(4):  # the first, and the three behind it
            assert teacher.begun.acquire(timeout=30)
        assert not teacher.begun.acquire(blocking=False)
        assert len(threads()) <= 3


def test_closing_drops_what_is_pending_and_waits_for_nobody():
    teacher = GatedTeacher()
    teacher.gate.set()
    unix = Unix(teacher)
    batches = unix.batches(data(10), net(1), depth=2)
    next(batches)
    for _ in range(3):
        assert teacher.begun.acquire(timeout=30)
    teacher.gate.clear()
    next(batches)
    assert teacher.begun.acquire(timeout=30)  # in flight, held at the gate
    batches.close()
    assert threads()
    assert unix.state_dict()["pending"] == []
    teacher.gate.set()
    assert len(list(unix.batches(data(2), net(1)))) == 2


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_error_of_the_teacher_comes_where_its_batch_would(depth):
    class Failing(LocalTeacher):
        def label(self, x, *, request_id, **how):
            if request_id.endswith("/2"):
                raise TeacherUnavailable("gone")
            return super().label(x, request_id=request_id, **how)

    unix = Unix(Failing())
    batches = unix.batches(data(6), net(1), depth)
    assert len(list(islice(batches, 2))) == 2
    with pytest.raises(TeacherUnavailable, match="gone"):
        next(batches)
    assert (unix.steps, unix.learnt) == (2, 24)


def test_an_error_of_the_loop_or_the_loader_leaves_no_thread():
    def loader():
        yield from data(2)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(Unix(LocalTeacher()).batches(loader(), net(1), depth=3))
    unix = Unix(LocalTeacher())
    with pytest.raises(InterruptedError), closing(unix.batches(data(6), net(1), depth=3)) as batches:
        raise InterruptedError(next(batches))


def test_one_loop_at_a_time():
    unix = Unix(LocalTeacher())
    with closing(unix.batches(data(), net(1))) as batches:
        next(batches)
        with pytest.raises(RuntimeError, match="still running"):
            next(unix.batches(data(), net(1)))
        with pytest.raises(RuntimeError, match="still running"):
            unix.load_state_dict(unix.state_dict())
    next(unix.batches(data(), net(1)))


# ---------------------------------------------------------------- stop and go on


@pytest.mark.parametrize("mixing", ["adaptive", "none", "uniform"])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_resumed_run_is_the_run_that_never_stopped(mixing, depth):
    xs = data(9, last=7)
    whole = LocalTeacher()
    student = net(1)
    unix = Unix(whole, mixing=mixing, generator=generator())
    file = io.BytesIO()

    def save(b):
        if unix.steps == 4:
            torch.save({"unix": unix.state_dict(), "student": student.state_dict()}, file)

    losses = train(unix, xs, student, depth, save, momentum=0)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert len(state["unix"]["pending"]) == depth
    resumed, student = LocalTeacher(), net(2)
    student.load_state_dict(state["student"])
    other = Unix(resumed, mixing=mixing, generator=generator(1234))
    other.load_state_dict(state["unix"])
    assert other.steps == 4
    lags = []
    assert train(other, xs[4:], student, depth, lambda b: lags.append(b.lag), momentum=0) == losses[4:]
    assert lags == [depth] * 5
    assert {key: sent.tolist() for key, (sent, _) in resumed.asked.items()} == {
        key: sent.tolist() for key, (sent, _) in whole.asked.items() if int(key.rpartition("/")[2]) >= 4
    }
    assert other.state_dict()["run"] == unix.state_dict()["run"]
    for counter in ("asked", "learnt", "scored", "steps"):
        assert getattr(other, counter) == getattr(unix, counter)


def test_state_before_the_pending_ones_are_drawn_still_holds_them():
    unix = Unix(LocalTeacher())
    with closing(unix.batches(data(), net(1), depth=2)) as batches:
        next(batches)
        state = unix.state_dict()
    fresh = Unix(LocalTeacher())
    fresh.load_state_dict(state)
    again = fresh.state_dict()
    assert [entry["request_id"] for entry in again["pending"]] == [f"{state['run']}/1", f"{state['run']}/2"]
    student = Watched(net(1))
    with closing(fresh.batches(data(), student, depth=0)) as batches:
        next(batches)
        assert [entry["request_id"] for entry in fresh.state_dict()["pending"]] == [f"{state['run']}/2"]
    assert student.calls == []  # a pending batch is not scored anew


def test_an_abandoned_batch_keeps_its_request_id_for_itself():
    teacher = LocalTeacher()  # refuses to be asked twice under one id
    unix = Unix(teacher)
    for _ in range(2):
        with closing(unix.batches(data(), net(1), depth=2)) as batches:
            next(batches)
    list(unix.batches(data(), net(1)))


def test_states_that_do_not_fit_are_refused():
    unix = Unix(LocalTeacher())
    with closing(unix.batches(data(n=16), net(1))) as batches:
        next(batches)
        state = unix.state_dict()
    fresh = Unix(LocalTeacher())
    with pytest.raises(ValueError, match="version 2, this program reads version 1"):
        fresh.load_state_dict(state | {"version": 2})
    with pytest.raises(ValueError, match=r"\['colour'\]"):
        fresh.load_state_dict(state | {"colour": 1})
    with pytest.raises(ValueError, match="pending batch"):
        fresh.load_state_dict(state | {"pending": [{"n": 16}]})
    fresh.load_state_dict(state)
    with pytest.raises(ValueError, match=r"gives 8 samples where 16 were pending: .* behind the 1 batches"):
        next(fresh.batches(data(n=8), net(1)))


# ---------------------------------------------------------------- does the teacher fit


class Oracle(LocalTeacher):
    """Reads the class off the first feature, and answers with `order[class]`."""

    def __init__(self, order, **description):
        output = pb.OutputDescription(name="logits", shape=[len(order)], **description)
        super().__init__(description=pb.TeacherDescription(outputs=[output]))
        self.order = torch.tensor(order)

    def answer(self, x):
        return 10.0 * nn.functional.one_hot(
            self.order[x[:, 0].round().long().clamp(0, len(self.order) - 1)], len(self.order)
        )


def readable(batches=20, n=64):
    draws = generator()
    for _ in range(batches):
        y = torch.randint(CLASSES, (n,), generator=draws)
        x = torch.randn(n, FEATURES, generator=draws)
        x[:, 0] = y
        yield x, y


@pytest.mark.parametrize("strategy", ["entropy", "random"])
@pytest.mark.parametrize("mixing", ["adaptive", "none", "uniform"])
def test_the_right_teacher_passes(mixing, strategy):
    teacher = Oracle(range(CLASSES), top1=0.99)
    unix = Unix(teacher, mixing=mixing, strategy=strategy, generator=generator())
    train(unix, readable(), net(1))
    assert unix.asked == 20 * 48 == sum(len(x) for x, _ in teacher.asked.values())
    assert unix.state_dict()["understood"] or mixing == "uniform"


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("mixing", ["adaptive", "none", "uniform"])
def test_a_permuted_teacher_stops_the_run(mixing, depth):
    unix = Unix(Oracle([1, 2, 3, 4, 0], class_names=list("abcde")), mixing=mixing, generator=generator())
    with pytest.raises(TeacherMisunderstands, match=r"class order.*its b is labelled a"):
        train(unix, readable(), net(1), depth)
    assert unix.steps < (20 if mixing == "uniform" else 8)


def test_top_k_answers_are_judged_too():
    class TopKOracle(TopKTeacher):
        def answer(self, x):
            return Oracle.answer(self, x)

    output = pb.OutputDescription(name="logits", shape=[CLASSES])
    teacher = TopKOracle(description=pb.TeacherDescription(outputs=[output]))
    teacher.order = torch.tensor([1, 2, 3, 4, 0])
    with pytest.raises(TeacherMisunderstands):
        train(Unix(teacher), readable(), net(1))


def test_without_labels_nothing_is_judged():
    teacher = Oracle([1, 2, 3, 4, 0])
    train(Unix(teacher), (x for x, _ in readable()), net(1))
    train(Unix(teacher), ((x, torch.full_like(y, -1)) for x, y in readable()), net(1))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("strategy", ["entropy", "random"])
@pytest.mark.parametrize("kind", [LocalTeacher, TopKTeacher])
def test_another_class_count_is_refused_before_any_loss(strategy, kind):
    teacher = kind(classes=7, description=pb.TeacherDescription(outputs=[pb.OutputDescription(shape=[7])]))
    losses = []
    unix = Unix(teacher, strategy=strategy, criterion=lambda logits, b: losses.append(b))
    with pytest.raises(InvalidQuery, match="answers for 7 classes, the student for 5"):
        unix.loss(net(1), *next(readable()))
    assert losses == []


def test_answers_of_the_wrong_number_are_refused():
    class Short(LocalTeacher):
        def answer(self, x):
            return super().answer(x)[1:]

    with pytest.raises(InvalidQuery, match="11 answers to 12 samples"):
        next(Unix(Short()).batches(data(), net(1)))


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0.0},
        {"keep": 1.5},
        {"keep": math.nan},
        {"clean": -0.1},
        {"clean": 32},
        {"sharpness": math.inf},
        {"temperature": 0.0},
        {"strategy": "entropie"},
        {"mixing": "mixup"},
        {"score_mode": "test"},
    ],
    ids=str,
)
def test_settings_are_checked(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}: (give|choose)"):
        Unix(LocalTeacher(), **settings)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(0, FEATURES), "at least one sample"),
        (torch.tensor(1.0), "at least one sample"),
        ((torch.zeros(4, FEATURES), torch.zeros(3)), r"y has shape \(3,\): give one for each of the 4"),
        ((torch.zeros(4, FEATURES), torch.zeros(4), torch.zeros(5)), "index has shape"),
        ((torch.zeros(4, FEATURES),) * 4, "a batch is x"),
        (torch.full((4, FEATURES), torch.nan), "has the student diverged"),
    ],
)
def test_batches_are_checked(batch, message):
    with pytest.raises(ValueError, match=message):
        next(Unix(LocalTeacher()).batches([batch], net(1)))


def test_depth_is_checked():
    with pytest.raises(ValueError, match="depth is -1"):
        Unix(LocalTeacher()).batches(data(), net(1), depth=-1)
