import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from student_worker.losses import TopK, distillation_loss, mixed_cross_entropy

CASES = json.loads((Path(__file__).parent / "reference" / "unix_vectors.json").read_text())["cases"]


def logits(n=6, c=10, seed=0, dtype=torch.float64):
    return 3 * torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def top_k(teacher, k, temperature):
    values, indices = teacher.topk(k, dim=1)
    tail = 1 - (teacher / temperature).softmax(1).gather(1, indices).sum(1)
    return TopK(values, indices, tail.clamp_min(0), temperature)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
def test_reference(case):
    student, teacher = (torch.tensor(case[f"{who}_logits"], dtype=torch.float64) for who in ("student", "teacher"))
    expected = pytest.approx(case["kd_loss"], abs=1e-6)
    assert distillation_loss(student, teacher, case["temperature"]).item() == expected
    everything = top_k(teacher, teacher.shape[1], case["temperature"])
    assert distillation_loss(student, everything, case["temperature"]).item() == expected


def test_by_hand():
    """Teacher (3/4, 1/4), student even, T = 1: log 2 - entropy; T = 2 on twice the logits: 4 times that."""
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    nats = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation_loss(student, teacher, 1.0).item() == pytest.approx(nats, rel=1e-6)
    assert distillation_loss(student, 2 * teacher, 2.0).item() == pytest.approx(4 * nats, rel=1e-6)


def test_top_k_by_hand():
    """Teacher (1/2, 1/4, 1/8, 1/8), k = 1; the student holds 1/4 each: KL of (1/2, 1/2) against (1/4, 3/4)."""
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    loss = distillation_loss(torch.zeros(1, 4), top_k(teacher, 1, 1.0), 1.0)
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)


def test_a_student_like_the_teacher_has_nothing_to_learn():
    teacher = logits()
    for answer in (teacher, top_k(teacher, 3, 4.0), top_k(teacher, 10, 4.0)):
        student = teacher.clone().requires_grad_()
        loss = distillation_loss(student, answer, 4.0)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert student.grad is not None
        assert student.grad.abs().max() < 1e-12
    assert distillation_loss(teacher.float() + 5, teacher.float(), 4.0).item() == pytest.approx(0, abs=1e-5)


def test_infinite_temperature_is_squared_error():
    """T^2 KL -> 1/(2c) |centred difference|^2 (Hinton et al., 1503.02531, section 2.1)."""
    student, teacher = logits(), logits(seed=1)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = difference.square().sum(1).mean() / (2 * 10)
    assert distillation_loss(student, teacher, 1e5).item() == pytest.approx(limit.item(), rel=1e-3)


def test_reductions():
    student, teacher = logits(), logits(seed=1)
    each = distillation_loss(student, teacher, 4.0, reduction="none")
    assert each.shape == (6,)
    assert distillation_loss(student, teacher, 4.0).item() == pytest.approx(each.mean().item())
    assert distillation_loss(student, teacher, 4.0, reduction="sum").item() == pytest.approx(each.sum().item())
    alone = [distillation_loss(s[None], t[None], 4.0).item() for s, t in zip(student, teacher, strict=True)]
    assert each.tolist() == pytest.approx(alone)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 10), temperature=st.floats(0.5, 20))
def test_top_k_never_exceeds_the_whole_and_grows_with_k(seed, k, temperature):
    """Coarse-graining cannot raise a KL (data processing inequality)."""
    student, teacher = logits(seed=seed), logits(seed=seed + 1)

    def loss(answer):
        return distillation_loss(student, answer, temperature, reduction="none")

    coarse, whole = loss(top_k(teacher, k, temperature)), loss(teacher)
    assert (coarse >= -1e-12).all()
    assert (coarse <= whole + 1e-9).all()
    assert (loss(top_k(teacher, max(k - 1, 1), temperature)) <= coarse + 1e-9).all()
    if k == 10:
        torch.testing.assert_close(coarse, whole)


def test_gradients():
    teacher = logits(3, 5, seed=1)
    for answer in (teacher, top_k(teacher, 2, 4.0), top_k(teacher, 5, 4.0)):
        assert torch.autograd.gradcheck(
            lambda student, answer=answer: distillation_loss(student, answer, 4.0), logits(3, 5).requires_grad_()
        )


def test_gradients_stay_finite_at_the_edges():
    certain = torch.tensor([[1e4, 0.0, -1e4], [-3e4, 0.0, 3e4]])
    student = torch.tensor([[-1e4, 0.0, 1e4], [3e4, 0.0, -3e4]]).requires_grad_()
    for answer in (certain, top_k(certain, 1, 1.0), top_k(certain, 2, 1.0), top_k(certain, 3, 1.0)):
        student.grad = None
        loss = distillation_loss(student, answer, 1.0)
        loss.backward()
        assert loss.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()
    nothing_on_top = TopK(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2), 1.0)
    assert distillation_loss(torch.zeros(2, 3), nothing_on_top, 1.0).item() == pytest.approx(math.log(1.5), rel=1e-5)


def test_no_gradient_to_the_answer():
    teacher = logits().requires_grad_()
    student = logits(seed=1).requires_grad_()
    distillation_loss(student, teacher, 4.0).backward()
    distillation_loss(student, top_k(teacher, 3, 4.0), 4.0).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype", "dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_autocast_changes_nothing(student_dtype, teacher_dtype, dtype):
    student, teacher = logits().to(student_dtype), logits(seed=1).to(teacher_dtype)
    y = torch.arange(6)
    share = torch.linspace(0, 1, 6)
    answer = top_k(teacher.float(), 3, 4.0)
    plain = [
        distillation_loss(student, teacher, 4.0),
        distillation_loss(student, answer, 4.0),
        mixed_cross_entropy(student, y, y.flip(0), share),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        cast = [
            distillation_loss(student, teacher, 4.0),
            distillation_loss(student, answer, 4.0),
            mixed_cross_entropy(student, y, y.flip(0), share),
        ]
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)


def test_mixed_cross_entropy():
    student = logits(4)
    y, partner = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 3, 0])
    share = torch.tensor([0.0, 0.25, 0.6, 1.0])
    losses = mixed_cross_entropy(student, y, partner, share)
    own, other = (F.cross_entropy(student, labels, reduction="none") for labels in (y, partner))
    assert losses[0] == own[0]
    assert losses[1].item() == pytest.approx((0.75 * own[1] + 0.25 * other[1]).item())
    assert losses[2].item() == pytest.approx(own[2].item())
    assert losses[3] == other[3]


def test_an_unlabelled_half_counts_for_nothing():
    student = logits(3).requires_grad_()
    y, partner, share = torch.tensor([-1, 2, -1]), torch.tensor([1, -1, -1]), torch.tensor([0.3, 0.4, 0.5])
    losses = mixed_cross_entropy(student, y, partner, share)
    assert losses[0].item() == pytest.approx(0.3 * F.cross_entropy(student[:1], partner[:1]).item())
    assert losses[1].item() == pytest.approx(0.6 * F.cross_entropy(student[1:2], y[1:2]).item())
    assert losses[2] == 0
    losses.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (student.grad[2] == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distillation_loss(logits(), logits(5), 4.0), r"shape \(5, 10\), the student's logits \(6, 10\)"),
        (lambda: distillation_loss(logits()[0], logits()[0], 4.0), r"give \[n, c\]"),
        (lambda: distillation_loss(logits(), logits(), 0.0), "temperature is 0.0"),
        (lambda: distillation_loss(logits(), logits(), math.nan), "temperature is nan"),
        (lambda: distillation_loss(logits(), logits(), 4.0, reduction="batchmean"), "reduction is 'batchmean'"),
        (
            lambda: distillation_loss(logits(), top_k(logits(), 3, 1.0), 4.0),
            "taken at 1.0: ask for a top-k answer at temperature 4.0",
        ),
        (lambda: distillation_loss(logits(), top_k(logits(5), 3, 4.0), 4.0), r"for 6 samples of 10 classes"),
        (lambda: distillation_loss(logits(c=2), top_k(logits(), 3, 4.0), 4.0), "1 <= k <= 2"),
        (
            lambda: mixed_cross_entropy(logits(), torch.zeros(5), torch.zeros(6), torch.zeros(6)),
            r"y has shape \(5,\): give one for each of the 6",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_temperature_that_travelled_as_float32_is_the_same():
    wire = torch.tensor(0.7, dtype=torch.float32).item()
    assert wire != 0.7
    distillation_loss(logits(), top_k(logits(), 3, wire), 0.7)


def test_a_student_that_excludes_all_tail_classes_keeps_finite_gradients():
    student = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]], requires_grad=True)
    answer = TopK(torch.tensor([[3.0, 1.0]]), torch.tensor([[0, 1]]), torch.tensor([0.0]), 1.0)
    loss = distillation_loss(student, answer, 1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad[0, :2].isfinite().all()
