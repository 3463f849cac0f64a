import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_worker.mixup import ranking
from student_worker.uncertainty import STRATEGIES, as_ratio, uncertainty

CASES = json.loads((Path(__file__).parent / "reference" / "unix_vectors.json").read_text())["cases"]
SCORED = [strategy for strategy in STRATEGIES if strategy != "random"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
@pytest.mark.parametrize("strategy", SCORED)
def test_reference(case, strategy):
    scores = uncertainty(torch.tensor(case["logits"], dtype=torch.float64), strategy)
    expected = torch.tensor(case["scores"][strategy], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.75, 0.0]]).log().clamp_min(-1e30)
    for strategy, expected in (
        ("confidence", [0.5, 0.25]),
        ("margin", [-0.25, -0.5]),
        ("entropy", [1.5 * math.log(2), 2 * math.log(2) - 0.75 * math.log(3)]),
    ):
        torch.testing.assert_close(uncertainty(logits, strategy), torch.tensor(expected))


@pytest.mark.parametrize("strategy", SCORED)
@settings(deadline=None, max_examples=30)
@given(logits=st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3)))
def test_bounded_for_all_finite_logits(strategy, logits):
    scores = uncertainty(torch.tensor(logits).reshape(-1, 3), strategy)
    low, high = {"confidence": (0, 2 / 3), "margin": (-1, 0), "entropy": (0, math.log(3))}[strategy]
    assert scores.shape == (len(logits),)
    assert ((scores >= low - 1e-5) & (scores <= high + 1e-5)).all()  # False for NaN


@pytest.mark.parametrize("strategy", SCORED)
@pytest.mark.parametrize("classes", [2, 10])
def test_as_a_ratio_it_goes_from_sure_to_the_most_unsure(strategy, classes):
    sure, even = torch.zeros(classes), torch.zeros(classes)
    sure[1] = 1e4
    ratios = as_ratio(uncertainty(torch.stack([sure, even]), strategy), strategy, classes)
    assert ratios.tolist() == pytest.approx([0, 1], abs=1e-6)
    assert ratios.max() <= 1


def test_ratios_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    for strategy, expected in (("confidence", 0.75), ("margin", 0.75), ("entropy", 1.5 * math.log(2) / math.log(3))):
        assert as_ratio(uncertainty(logits, strategy), strategy, 3).item() == pytest.approx(expected)
    assert as_ratio(torch.tensor([0.25]), "random", 0).item() == 0.25


def test_underflow_is_certainty():
    logits = torch.tensor([[3e38, -3e38, 0.0], [200.0, 0.0, -200.0]])
    assert uncertainty(logits, "entropy").tolist() == [0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_autocast_changes_nothing(strategy, given_dtype, dtype):
    logits = torch.randn(32, 10).to(given_dtype)
    plain = uncertainty(logits, strategy, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        cast = uncertainty(logits, strategy, generator=torch.Generator().manual_seed(1))
    assert plain.dtype == cast.dtype == dtype
    assert torch.equal(plain, cast)
    if strategy != "random":
        assert torch.equal(plain, uncertainty(logits.to(dtype), strategy))


def test_close_entropies_keep_their_order():
    """Of 64 entropies bfloat16 tells few apart, and would rank the rest by place."""
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)) * 0.3
    with torch.autocast("cpu", torch.bfloat16):
        scores = uncertainty(logits, "entropy")
    exact = uncertainty(logits.double(), "entropy")
    assert len(scores.unique()) == 64 > 2 * len(scores.bfloat16().unique())
    assert torch.equal(ranking(scores), ranking(exact))


def test_random_follows_the_generator_and_not_the_logits():
    def draw(logits: Tensor) -> Tensor:
        return uncertainty(logits, "random", generator=torch.Generator().manual_seed(3))

    assert torch.equal(draw(torch.zeros(5, 2)), draw(torch.ones(5, 7)))
    assert len(draw(torch.zeros(50, 2)).unique()) == 50


def test_no_samples():
    assert uncertainty(torch.zeros(0, 10), "entropy").shape == (0,)


@pytest.mark.parametrize(
    ("logits", "strategy", "message"),
    [
        (torch.zeros(2, 3), "entropie", "strategy is 'entropie': choose one of random, confidence, margin, entropy"),
        (torch.zeros(3), "entropy", r"shape \(3,\)"),
        (torch.zeros(3, 1), "entropy", "at least two classes"),
        (torch.tensor([[0.0, torch.nan], [0, 1]]), "margin", "1 of 2 samples are not finite"),
        (torch.tensor([[0.0, torch.inf]]), "random", "not finite"),
    ],
)
def test_refused(logits, strategy, message):
    with pytest.raises(ValueError, match=message):
        uncertainty(logits, strategy)
