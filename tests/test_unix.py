import io
import math
import threading
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from protos import teacher_pb2 as pb
from student_worker.answer import Answer
from student_worker.errors import InvalidQuery, TeacherMisunderstands, TeacherUnavailable
from student_worker.losses import TopK, distillation_loss, mixed_cross_entropy
from student_worker.unix import Unix
from tests.serving import until

CLASSES, FEATURES = 5, 12


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def net(seed, width=16, classes=CLASSES):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes)
        )


class LocalTeacher:
    """Answers with a network's outputs and remembers what it was asked."""

    def __init__(self, classes=CLASSES, description=None):
        self.network = net(99, width=64, classes=classes).eval().requires_grad_(False)
        self.description = description or pb.TeacherDescription()
        self.asked = {}

    def answer(self, x):
        return self.network(x.float())

    def label(self, x, *, request_id, cache_mode):
        assert request_id not in self.asked
        self.asked[request_id] = (x.clone(), cache_mode)
        return Answer(logits=self.answer(x), sources=("computed",) * len(x), description=self.description)


class TopKTeacher(LocalTeacher):
    def label(self, x, *, request_id, cache_mode):
        logits = super().label(x, request_id=request_id, cache_mode=cache_mode).logits
        values, indices = logits.topk(2, dim=1)
        tail = 1 - (logits / 4).softmax(1).gather(1, indices).sum(1)
        return Answer(logits=TopK(values, indices, tail, 4.0), description=self.description)


class Watched(nn.Module):
    """A student that notes the mode it is called in, and what it is called on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.calls = []

    def forward(self, x):
        self.calls.append((self.inner.training, torch.is_grad_enabled(), x.clone()))
        return self.inner(x.float())


def data(batches=6, n=16, last=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [n] * batches if last is None else [n] * (batches - 1) + [last]
    return [torch.randn(size, FEATURES, generator=generator) for size in sizes]


def with_labels(loader):
    start = 0
    for x in loader:
        index = torch.arange(start, start + len(x))
        yield x, index % CLASSES, index
        start += len(x)


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def train(unix, loader, student, depth=1, after=lambda b: None, *, momentum=0.9):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=momentum)
    losses = []
    for b in unix.batches(loader, student, depth):
        loss = unix.criterion(student(b.x), b)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after(b)
    return losses


# ---------------------------------------------------------------- the algorithm


@pytest.mark.parametrize("depth", [0, 2])
def test_without_selection_and_mixing_it_is_plain_distillation(depth):
    """200 steps on a batch-norm student against a loop written by hand."""
    xs = data(batches=200)
    by_hand, student = net(1), net(1)
    teacher = LocalTeacher()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9)
    expected = []
    for x in xs:
        with torch.no_grad():
            target = teacher.network(x)
        optimizer.zero_grad()
        log_p = (by_hand(x) / 4).log_softmax(1)
        loss = 16 * nn.functional.kl_div(log_p, (target / 4).softmax(1), reduction="batchmean")
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    unix = Unix(teacher, keep=1.0, mixing="none", score_mode="eval")
    assert train(unix, xs, student, depth) == pytest.approx(expected, abs=1e-5)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=0, atol=1e-5)


def test_one_step_by_its_own_parts():
    """loss() against the published step, written out; the scoring pass has moved the statistics once already."""
    x, y = data(1)[0], torch.arange(16) % CLASSES
    teacher, student, by_hand = LocalTeacher(), net(1), net(1)
    loss = Unix(teacher, generator=generator()).loss(student, x, y)

    with torch.no_grad():
        p = by_hand(x).double().softmax(1)
    rank = (-p * p.log()).sum(1).argsort(descending=True)
    draws = generator()
    lam = torch.rand((), generator=draws, dtype=torch.float64).item()
    partner = torch.randperm(16, generator=draws)
    r = torch.arange(16, dtype=torch.float64)
    share = (lam * torch.sigmoid(10 * (r / 16 - 15 / 32))).float()[:12, None]
    mixed = (1 - share) * x[rank[:12]] + share * x[partner[:12]]
    expected = distillation_loss(by_hand(mixed), teacher.network(mixed), 4.0)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name])


@pytest.mark.parametrize("mixing", ["adaptive", "uniform", "none"])
def test_what_is_handed_out_fits_together(mixing):
    xs = data(3)
    teacher = LocalTeacher()
    unix = Unix(teacher, mixing=mixing, generator=generator())
    everything = torch.cat(xs)
    for b in unix.batches(with_labels(xs), net(1)):
        assert b.share.shape == b.y.shape == b.index.shape == (12,)
        assert b.answer.shape == (12, CLASSES)
        assert b.source == ("computed",) * 12
        assert torch.equal(b.y, b.index % CLASSES)
        torch.testing.assert_close(b.answer, teacher.network(b.x))
        if mixing == "none":
            assert torch.equal(b.x, everything[b.index])
            assert torch.equal(b.index, b.index.sort().values)
            assert torch.equal(b.y_partner, b.y)
            assert (b.share == 0).all()
        else:
            partners = (b.x - (1 - b.share[:, None]) * everything[b.index]) / b.share[:, None]
            nearest = torch.cdist(partners, everything).argmin(1)
            assert torch.equal(nearest % CLASSES, b.y_partner)
            assert (b.share.diff() == 0).all() if mixing == "uniform" else (b.share.diff() > 0).all()
    modes = {mode for _, mode in teacher.asked.values()}
    assert modes == {"use" if mixing == "none" else "bypass"}


def test_counts_follow_the_batch_in_hand():
    unix = Unix(LocalTeacher(), keep=0.75, generator=generator())
    kept = [len(b.x) for b in unix.batches(data(4, last=6), net(1))]
    assert kept == [12, 12, 12, 5]  # 4.5 rounds up
    assert (unix.asked, unix.learnt, unix.scored, unix.steps) == (41, 41, 54, 4)
    assert [len(b.x) for b in Unix(LocalTeacher(), keep=0.01).batches(data(1), net(1))] == [1]


def test_asked_is_the_sum_of_the_kept():
    teacher = LocalTeacher()
    unix = Unix(teacher, keep=0.6)
    kept = sum(len(b.x) for b in unix.batches(with_labels(data(7, n=11, last=3)), net(1)))
    assert unix.asked == kept == sum(len(x) for x, _ in teacher.asked.values())


def test_random_asks_no_student():
    student = Watched(net(1))
    unix = Unix(LocalTeacher(), strategy="random", generator=generator())
    first, second = unix.batches(data(2), student)
    assert student.calls == []
    assert unix.scored == 0
    assert not torch.equal(first.share, second.share)


@pytest.mark.parametrize("strategy", ["confidence", "margin", "entropy"])
def test_the_least_certain_are_kept(strategy):
    x = torch.zeros(8, 2)
    x[:, 0] = torch.tensor([5.0, 0.1, 3.0, 0.0, 4.0, 0.2, 2.0, 1.0])

    class Two(LocalTeacher):
        def answer(self, x):
            return x

    unix = Unix(Two(), keep=0.5, mixing="none", strategy=strategy)
    (b,) = unix.batches([(x, torch.zeros(8), torch.arange(8))], nn.Identity())
    assert b.index.tolist() == [1, 3, 5, 7]


def test_the_same_seeds_give_the_same_run():
    def run(seed):
        return train(Unix(LocalTeacher(), generator=generator(seed)), data(), net(1))

    assert run(7) == run(7) != run(8)


def test_the_default_generator_follows_the_seed_and_leaves_torchs_own_stream_alone():
    def run():
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        unix = Unix(LocalTeacher(), strategy="random")
        shares = [b.share.tolist() for b in unix.batches(data(2), nn.Identity())]
        assert torch.equal(before, torch.random.get_rng_state())
        return shares

    with torch.random.fork_rng():
        assert run() == run()


# ---------------------------------------------------------------- the student's mode


def test_scoring_in_train_mode_moves_the_statistics_and_in_eval_mode_leaves_no_trace():
    for mode, moves in (("train", 1), ("eval", 0)):
        student = Watched(net(1))
        unix = Unix(LocalTeacher(), score_mode=mode)
        next(unix.batches(data(1), student))
        ((trained, grad, _),) = student.calls
        assert trained is (mode == "train")
        assert not grad
        assert student.inner[2].num_batches_tracked == moves
        assert all(module.training for module in student.modules())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_frozen_layers_stay_frozen(mode):
    student = net(1)
    student[2].eval()
    next(Unix(LocalTeacher(), score_mode=mode).batches(data(1), student))
    assert student[2].num_batches_tracked == 0
    assert [module.training for module in student] == [True, True, False, True, True]


def test_a_student_in_eval_mode_is_scored_as_it_trains_and_put_back():
    student = Watched(net(1)).eval()
    next(Unix(LocalTeacher()).batches(data(1), student))
    assert student.calls[0][0]
    assert not any(module.training for module in student.modules())


def test_modes_are_put_back_when_scoring_fails():
    student = nn.Sequential(net(1), nn.Linear(CLASSES + 1, 2)).eval()
    with pytest.raises(RuntimeError, match="shapes"):
        next(Unix(LocalTeacher()).batches(data(1), student))
    assert not any(module.training for module in student.modules())


def test_under_autocast_the_student_still_learns():
    """Weights that scoring casts without gradients are reused by the step, and need a graph there."""
    student = net(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = Unix(LocalTeacher()).loss(student, data(1)[0])
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (student[1].weight, student[4].weight))


# ---------------------------------------------------------------- what is sent


def test_the_student_sees_exactly_what_was_sent():
    pixels = [torch.randint(256, (16, 3, 2, 2), dtype=torch.uint8, generator=generator(s)) for s in range(3)]
    teacher, student = LocalTeacher(), Watched(net(1))

    def normalise(x):
        assert x.dtype == torch.uint8
        return x.float() / 255

    unix = Unix(teacher, to_student=normalise, generator=generator())
    for b, (sent, _) in zip(list(unix.batches(pixels, student)), teacher.asked.values(), strict=True):
        assert sent.dtype == torch.uint8
        assert torch.equal(b.x, normalise(sent))
        torch.testing.assert_close(b.answer, teacher.answer(sent))
    for x, (_, _, scored) in zip(pixels, student.calls, strict=True):
        assert torch.equal(scored, normalise(x))


def test_to_teacher_changes_only_what_is_sent():
    teacher = LocalTeacher()
    unix = Unix(teacher, to_teacher=lambda x: x.half())
    (b,) = unix.batches(data(1), net(1))
    ((sent, _),) = teacher.asked.values()
    assert torch.equal(sent, b.x.half())
    assert b.x.dtype == torch.float32


def test_numpy_and_loaders():
    x = data(1)[0]
    (from_numpy,) = Unix(LocalTeacher(), generator=generator()).batches([x.numpy()], net(1))
    (from_loader,) = Unix(LocalTeacher(), generator=generator()).batches(
        DataLoader(TensorDataset(x, torch.zeros(16, dtype=torch.int64)), batch_size=16), net(1)
    )
    assert torch.equal(from_numpy.x, from_loader.x)
    assert from_numpy.y is None
    assert from_loader.y.tolist() == [0] * 12
    assert from_loader.index is None
    next(Unix(LocalTeacher()).batches([(np.zeros((4, FEATURES), np.float32), np.arange(4))], net(1)))


def test_top_k_answers():
    unix = Unix(TopKTeacher())
    assert all(math.isfinite(loss) for loss in train(unix, data(), net(1)))


def test_a_criterion_of_ones_own():
    def hard(student_logits, b):
        return mixed_cross_entropy(student_logits, b.y, b.y_partner, b.share)

    unix = Unix(LocalTeacher(), criterion=hard)
    student = net(1)
    for b in unix.batches(with_labels(data(2)), student):
        logits = student(b.x)
        assert torch.equal(unix.criterion(logits, b), hard(logits, b).mean())
    scalar = Unix(LocalTeacher(), criterion=lambda logits, b: logits.mean())
    with pytest.raises(ValueError, match=r"criterion gave shape \(\): give one loss a sample, \[12\]"):
        scalar.loss(net(1), data(1)[0])


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


class GatedTeacher(LocalTeacher):
    """Holds every answer until the gate opens, and counts the calls that have begun."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)

    def label(self, x, *, request_id, cache_mode):
        self.begun.release()
        assert self.gate.wait(30)
        return super().label(x, request_id=request_id, cache_mode=cache_mode)


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
        def label(self, x, *, request_id, cache_mode):
            if request_id.endswith("/2"):
                raise TeacherUnavailable("gone")
            return super().label(x, request_id=request_id, cache_mode=cache_mode)

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
