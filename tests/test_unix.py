"""The step of UNIX: what is scored, kept, mixed, sent and learnt."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from student_worker.losses import distillation_loss, mixed_cross_entropy
from student_worker.unix import Unix
from tests.students import (
    CLASSES,
    FEATURES,
    LocalTeacher,
    TopKTeacher,
    Watched,
    data,
    generator,
    net,
    train,
    with_labels,
)

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
