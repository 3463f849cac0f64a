import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_worker.mixup import adaptive_mixup, mix, mixing_coefficients, ranking, uniform_mixup

CASES = json.loads((Path(__file__).parent / "reference" / "unix_vectors.json").read_text())["cases"]
by_seed = pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


@by_seed
def test_reference_coefficients(case):
    close(mixing_coefficients(len(case["x"]), case["b"], case["w"]), case["coefficients"])


@by_seed
@pytest.mark.parametrize("strategy", ["confidence", "margin", "entropy"])
def test_reference_mixes(case, strategy):
    mixed = adaptive_mixup(
        torch.tensor(case["x"], dtype=torch.float64),
        torch.tensor(case["scores"][strategy], dtype=torch.float64),
        keep=case["k"],
        clean=case["b"],
        sharpness=case["w"],
        lam=case["lam"],
        partner=torch.tensor(case["partner"]),
    )
    expected = case["mixed"][strategy]
    close(mixed.x, expected["x"])
    close(mixed.share, expected["share"])
    assert mixed.kept.tolist() == expected["kept"]
    assert mixed.partner.tolist() == expected["partner"]


def test_published_setting():
    """The figures of docs/unix.md, step 2."""
    c = mixing_coefficients(64, 32, 10.0)
    assert c[31] == pytest.approx(0.48, abs=0.005)
    assert c[31] < 0.5 < c[32]
    assert c[:32].mean() / 2 == pytest.approx(0.069, abs=5e-4)  # lam is 1/2 on average
    assert c[:48].mean() / 2 == pytest.approx(0.17, abs=5e-3)


def test_extreme_sharpness():
    assert mixing_coefficients(4, 2, 1e9).tolist() == [0, 0, 1, 1]
    assert mixing_coefficients(4, 2, 0.0).tolist() == [0.5] * 4


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 200), data=st.data())
def test_coefficients_rise_within_0_and_1(n, data):
    clean = data.draw(st.integers(0, n))
    c = mixing_coefficients(n, clean, data.draw(st.floats(0, 1e6)))
    assert c.dtype == torch.float64
    assert ((c >= 0) & (c <= 1)).all()
    assert (c.diff() >= 0).all()
    assert (c[:clean] <= 0.5).all()
    assert (c[clean:] >= 0.5).all()


def test_ties_go_by_batch_position():
    assert ranking(torch.tensor([1.0, 2.0, 1.0, 2.0, 3.0])).tolist() == [4, 1, 3, 0, 2]
    assert ranking(torch.zeros(300)).tolist() == list(range(300))


def batch(dtype=torch.float32, n=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, 4, 4, generator=generator)
    return {
        "x": (x * 255).to(dtype) if not dtype.is_floating_point else x.to(dtype),
        "scores": torch.rand(n, generator=generator),
        "keep": 6,
        "clean": 4,
        "sharpness": 10.0,
        "lam": 0.7,
        "partner": torch.randperm(n, generator=generator),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computed_in_the_dtype_of_x_whatever_autocast_says(dtype):
    given_batch = batch(dtype)
    plain = adaptive_mixup(**given_batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = adaptive_mixup(**given_batch)
    assert plain.x.dtype == plain.share.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    share = plain.share.view(-1, 1, 1, 1)
    x = given_batch["x"]
    assert torch.equal(plain.x, (1 - share) * x[plain.kept] + share * x[plain.partner])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_integers_are_mixed_in_float32_and_rounded(dtype):
    given_batch = batch(dtype)
    mixed = adaptive_mixup(**given_batch)
    x, share = given_batch["x"].double(), mixed.share.double().view(-1, 1, 1, 1)
    exact = (1 - share) * x[mixed.kept] + share * x[mixed.partner]
    assert mixed.x.dtype == dtype
    assert mixed.share.dtype == torch.float32
    assert ((mixed.x.double() - exact).abs() <= 0.5 + 1e-4).all()


def test_uint8_by_hand():
    x = torch.tensor([[0], [255], [100]], dtype=torch.uint8)
    kept, partner = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 1, 0, 0])
    mixed = mix(x, kept, partner, torch.tensor([0.25, 0.5, 0.125, 0.5]))
    assert mixed.flatten().tolist() == [64, 255, 88, 128]  # 63.75, 255, 87.5 and 127.5: half to even


def test_a_recipe_makes_the_same_mix_again():
    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
        given_batch = batch(dtype)
        mixed = adaptive_mixup(**given_batch)
        assert torch.equal(mix(given_batch["x"], mixed.kept, mixed.partner, mixed.share), mixed.x)


def test_no_share_changes_nothing():
    given_batch = batch() | {"lam": 0.0}
    mixed = adaptive_mixup(**given_batch)
    assert torch.equal(mixed.x, given_batch["x"][mixed.kept])


def test_uniform_gives_every_rank_lam():
    given_batch = {key: value for key, value in batch().items() if key not in {"clean", "sharpness"}}
    mixed = uniform_mixup(**given_batch)
    x = given_batch["x"]
    assert mixed.kept.tolist() == ranking(given_batch["scores"])[:6].tolist()
    assert mixed.share.tolist() == pytest.approx([0.7] * 6)
    torch.testing.assert_close(mixed.x, 0.3 * x[mixed.kept] + 0.7 * x[mixed.partner])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 9}, "keep is 9: it counts samples of a batch of 8"),
        ({"keep": 0}, "keep is 0"),
        ({"clean": 9}, "clean is 9"),
        ({"sharpness": float("nan")}, "sharpness is nan"),
        ({"sharpness": -1.0}, "sharpness is -1"),
        ({"lam": 1.1}, "lam is 1.1"),
        ({"scores": torch.zeros(7)}, r"scores have shape \(7,\)"),
        ({"scores": torch.full((8,), torch.nan)}, "NaN"),
        ({"partner": torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])}, "no permutation"),
        ({"partner": torch.arange(6)}, "no permutation"),
        ({"x": torch.zeros(8, dtype=torch.bool)}, "x is torch.bool"),
        ({"x": torch.zeros(0, 3)}, "n is 0"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        adaptive_mixup(**(batch() | change))
