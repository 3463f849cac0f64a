"""How many replicas there should be: the decision alone."""

import math

import pytest

from teacher_server.scaling import Load, Moment, Policy, moment, queue_seconds, wanted

POLICY = Policy(minimum=1, maximum=8, target_seconds=0.1, down_seconds=10)


def moments(count, wait=0.0, busy=0.0, queries=10, waiting=0, seconds=1.0):
    """So many moments of a second, in which queries waited `wait` on average and devices were busy `busy` in all."""
    return [Moment(seconds, queries, queries * wait, busy * seconds, waiting)] * count


def test_a_moment_is_what_all_replicas_did_in_it():
    before = [Load(10, 1.0, 5.0, 7), Load(20, 2.0, 6.0, 9)]
    now = [Load(13, 1.6, 5.5, 1), Load(21, 2.2, 6.25, 2)]
    found = moment(2.0, list(zip(before, now, strict=True)))
    assert found == pytest.approx(Moment(2.0, 4, 0.8, 0.75, 3))
    assert queue_seconds([found]) == pytest.approx(0.2)


def test_nobody_waits_where_nothing_is_asked():
    assert queue_seconds(moments(5, queries=0)) == 0
    assert queue_seconds([]) == 0


def test_who_waits_and_is_never_served_waits_for_ever():
    assert queue_seconds(moments(5, queries=0, waiting=3)) == math.inf
    assert queue_seconds([*moments(4, queries=0, waiting=3), *moments(1, queries=0)]) == 0
    assert wanted(1, 1, moments(5, queries=0, waiting=3), POLICY) == 2


def test_longer_waits_than_the_target_bring_half_as_many_more():
    assert [wanted(n, n, moments(5, wait=0.11), POLICY) for n in (1, 2, 3, 4, 6, 8)] == [2, 3, 5, 6, 8, 8]


@pytest.mark.parametrize("wait", [0.0, 0.06, 0.1])
def test_within_the_target_nothing_is_added(wait):
    assert wanted(2, 2, moments(5, wait=wait), POLICY) == 2


def test_a_short_burst_adds_nothing():
    assert wanted(1, 1, moments(4, wait=1.0), POLICY) == 1
    assert wanted(1, 1, [*moments(4), *moments(1, wait=0.4)], POLICY) == 1
    assert wanted(1, 1, [*moments(4), *moments(1, wait=0.6)], POLICY) == 2, "it is the mean over queries"


def test_what_was_long_ago_does_not_count():
    assert wanted(1, 1, [*moments(60, wait=5.0), *moments(5)], POLICY) == 1


def test_while_one_is_on_its_way_no_other_is_asked_for():
    assert wanted(2, 1, moments(60, wait=1.0), POLICY) == 2


def test_calm_gives_up_one_at_a_time_down_to_the_minimum():
    assert [wanted(n, n, moments(10), POLICY) for n in (4, 3, 2, 1)] == [3, 2, 1, 1]


def test_calm_must_have_lasted():
    assert wanted(2, 2, moments(9), POLICY) == 2
    assert wanted(2, 2, [*moments(1, wait=0.6), *moments(9)], POLICY) == 2
    assert wanted(2, 2, moments(20, seconds=0.4), POLICY) == 2
    assert wanted(2, 2, moments(25, seconds=0.4), POLICY) == 1


def test_waits_between_half_the_target_and_all_of_it_change_nothing():
    assert wanted(2, 2, moments(100, wait=0.06), POLICY) == 2


def test_nobody_is_given_up_whose_work_the_others_have_no_time_for():
    assert wanted(2, 2, moments(10, busy=0.71), POLICY) == 2
    assert wanted(2, 2, moments(10, busy=0.69), POLICY) == 1
    assert wanted(4, 4, moments(10, busy=2.2), POLICY) == 4
    assert wanted(4, 4, moments(10, busy=2.0), POLICY) == 3


def test_one_that_never_came_is_given_up_too():
    assert wanted(3, 2, moments(10), POLICY) == 2


@pytest.mark.parametrize("rate", [40.0, 90.0, 250.0, 700.0])
def test_it_settles(rate):
    """Queues of devices that take 10 ms a query: the number found carries the rate, and then stays."""
    number, history, numbers = 1, [], []
    for _ in range(300):
        utilisation = min(rate * 0.01 / number, 0.999)
        wait = 0.01 * utilisation / (2 * (1 - utilisation)) if utilisation < 0.999 else 1.0
        history.append(Moment(1.0, int(rate), int(rate) * wait, number * utilisation, 0))
        better = wanted(number, number, history, Policy(1, 16, target_seconds=0.05, down_seconds=10))
        if better != number:
            history = []
        number = better
        numbers.append(number)
    assert len(set(numbers[100:])) == 1
    assert rate * 0.01 < number <= math.ceil(rate * 0.01 / 0.7) + 1
