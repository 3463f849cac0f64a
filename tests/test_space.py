"""What a sweep tries: grids, draws, and what is none."""

import math

import pytest

from student_worker.space import points


def test_lists_are_crossed_and_the_first_moves_slowest():
    assert points([{"seed": [0, 1], "student": ["a", "b"], "keep": 0.5}], 1, 0) == [
        {"seed": 0, "student": "a", "keep": 0.5},
        {"seed": 0, "student": "b", "keep": 0.5},
        {"seed": 1, "student": "a", "keep": 0.5},
        {"seed": 1, "student": "b", "keep": 0.5},
    ]


def test_several_tables_are_tried_one_after_another():
    tables = [{"seed": 0, "student": "a"}, {"seed": [1, 2]}]
    assert points(tables, 1, 0) == [{"seed": 0, "student": "a"}, {"seed": 1}, {"seed": 2}]


def test_draws_stay_within_their_bounds_and_reach_both_ends():
    space = {
        "keep": {"uniform": [0.25, 0.75]},
        "learning_rate": {"loguniform": [0.001, 10]},
        "crop": {"randint": [1, 4]},
        "strategy": {"choice": ["entropy", "margin"]},
    }
    drawn = points([space], 2000, 0)
    assert len(drawn) == 2000
    keep, rate = ([point[name] for point in drawn] for name in ("keep", "learning_rate"))
    assert 0.25 <= min(keep) < 0.26
    assert 0.74 < max(keep) <= 0.75
    assert sum(keep) / 2000 == pytest.approx(0.5, abs=0.02)
    assert 0.001 <= min(rate) < 0.0011
    assert 9 < max(rate) <= 10
    # As many below the geometric middle as above it: an arithmetic draw would have 1 % there.
    assert sum(value < 0.1 for value in rate) / 2000 == pytest.approx(0.5, abs=0.05)
    assert {point["crop"] for point in drawn} == {1, 2, 3}
    assert {point["strategy"] for point in drawn} == {"entropy", "margin"}


def test_each_point_of_the_grid_has_draws_of_its_own_and_a_seed_names_them():
    space = [{"seed": [0, 1], "keep": {"uniform": [0.1, 0.9]}}, {"method": "kd"}]
    drawn = points(space, 3, 7)
    assert [point.get("seed") for point in drawn] == [0, 0, 0, 1, 1, 1, None]
    assert len({point["keep"] for point in drawn[:6]}) == 6
    assert drawn == points(space, 3, 7)
    assert drawn != points(space, 3, 8)


def test_a_table_that_is_no_distribution_is_a_value():
    assert points([{"student_arguments": {"width": 8}}], 1, 0) == [{"student_arguments": {"width": 8}}]
    widths = points([{"student_arguments": {"choice": [{"width": 8}]}}], 1, 0)
    assert widths == [{"student_arguments": {"width": 8}}]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "keep: an empty list leaves nothing to try"),
        ({"choice": []}, "keep: choice takes a list of values"),
        ({"choice": "ab"}, "keep: choice takes a list of values, got 'ab'"),
        ({"uniform": [1]}, "keep: uniform takes \\[low, high\\], got \\[1\\]"),
        ({"uniform": [0.5, 0.5]}, "keep: uniform takes \\[low, high\\] with low < high"),
        ({"uniform": [0, math.inf]}, "keep: uniform takes"),
        ({"uniform": [False, True]}, "keep: uniform takes"),
        ({"loguniform": [0, 1]}, "with 0 < low < high, got \\[0, 1\\]"),
        ({"randint": [0, 1.5]}, "keep: randint takes whole numbers"),
    ],
)
def test_what_is_no_distribution_is_named(values, words):
    with pytest.raises(ValueError, match=words):
        points([{"keep": values}], 1, 0)


def test_trials_that_would_only_come_again_are_refused():
    with pytest.raises(ValueError, match='for repetitions sweep the seed: "seed"'):
        points([{"keep": [0.5, 0.75]}], 2, 0)
