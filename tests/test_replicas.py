"""A student's books on its teacher's replicas: every way from state to state, and the races, with a clock set by hand.

No server runs here: channels that nobody uses do not connect. tests/test_replica_calls.py has the calls.
"""

import grpc
import pytest

from protos import teacher_pb2 as pb
from student_worker.replica import State
from student_worker.replicas import LEAST_PATIENCE, P99_MULTIPLE, PROBE_SECONDS, Replicas

A, B, C = "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"
TIMEOUT = 1000.0


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Books(Replicas):
    """With what the tests do again and again."""

    def __init__(self, *seeds):
        self.clock = Clock()
        self.channels = []
        super().__init__(seeds, self._channel, TIMEOUT, self.clock)

    def _channel(self, address):
        self.channels.append(grpc.insecure_channel(address))
        return self.channels[-1]

    def call(self, samples=1, *tried):
        flight = self.take(samples, tried)
        return None if flight is None else flight

    def asked(self, seconds=0.1):
        """Where a call goes that is answered after so long."""
        flight = self.take(1, ())
        self.clock.now += seconds
        self.answered(flight)
        return flight.replica.address

    def member(self, address):
        return self._members[address]

    def states(self):
        return {address: replica.state for address, replica in self._members.items()}

    def probe(self, *answering, fingerprint="f"):
        """One turn of the keeper in which these answer; who was probed."""
        due = self.to_probe()
        for replica, link in due:
            here = replica.address in answering
            self.probed(replica, link, described(fingerprint) if here else None, "nobody there")
        return [replica.address for replica, _ in due]

    def later(self, seconds):
        self.clock.now += seconds


def described(fingerprint="f", address="", listed=()):
    return pb.DescribeResponse(
        teachers=[pb.TeacherDescription(name="t", fingerprint=fingerprint)], address=address, replicas=listing(*listed)
    )


def listing(*addresses, fingerprint="f", teacher="t"):
    return [pb.Replica(address=address, teacher=teacher, fingerprint=fingerprint) for address in addresses]


def is_closed(link):
    try:
        link.stub.Describe.future(pb.DescribeRequest()).cancel()
    except ValueError:
        return True
    return False


@pytest.fixture
def make():
    made = []

    def books(*seeds, listed=(), latency=0.1):
        """The first address has answered, the listed ones have been probed, all at the same speed."""
        made.append(replicas := Books(*seeds))
        replicas.asked(latency)
        replicas.pin("t", "f")
        replicas.learn(listing(*listed))
        replicas.probe(*listed)
        for address in listed:
            replicas.member(address).latencies.append(latency)
        return replicas

    yield books
    for replicas in made:
        replicas.close()


# ---------------------------------------------------------------- who is asked


def test_the_fewest_samples_in_flight_then_the_longest_unused(make):
    replicas = make(A, listed=(A, B, C))
    flights = [replicas.call(samples) for samples in (10, 3, 4, 2, 5)]
    assert [flight.replica.address for flight in flights] == [B, C, A, C, A]
    for flight in flights:
        replicas.answered(flight)
    assert [replicas.asked() for _ in range(4)] == [B, C, A, B]


def test_an_address_that_was_given_serves_to_find_the_listed_ones_and_when_these_are_gone(make):
    balancer = "localhost:1"
    replicas = make(balancer, listed=(A, B))
    assert {replicas.asked() for _ in range(6)} == {A, B}
    for _ in range(2):
        replicas.lost(replicas.call(), "gone")
    assert [replicas.asked() for _ in range(2)] == [balancer] * 2
    replicas.later(PROBE_SECONDS)
    assert set(replicas.probe(B)) == {A, B}
    assert replicas.asked() == B


def test_a_listed_replica_is_asked_once_it_has_answered_and_missed_lists_alone_do_not_end_it(make):
    replicas = make(A)
    replicas.learn(listing(A, B))
    assert replicas.asked() == replicas.asked() == A
    assert replicas.probe(B) == [B]
    assert replicas.asked() == B
    for _ in range(2):
        replicas.learn(listing(A))  # of a server whose last look was before B came
    replicas.learn(listing(A, B))
    replicas.learn([])
    assert replicas.in_rotation == [A, B]
    for _ in range(3):
        replicas.learn(listing(A))
    assert replicas.addresses == [A]


def test_who_answers_is_kept_where_the_lists_name_nobody_who_does(make):
    replicas = make(A, listed=(A, B))
    replicas.lost(flight := replicas.call(), "gone")
    left = {A: B, B: A}[flight.replica.address]
    for _ in range(5):
        replicas.learn(listing(C))
    assert replicas.asked() == left
    replicas.probe(C)
    assert replicas.asked() == C


def test_whoever_drains_is_left_before_it_refuses(make):
    replicas = make(A, listed=(A, B))
    flight = replicas.call()
    going = flight.replica
    staying = {A: B, B: A}[going.address]
    replicas.later(0.1)
    replicas.told(going, going.link, described(address=going.address, listed=[staying]))
    assert [replicas.asked() for _ in range(2)] == [staying] * 2
    replicas.answered(flight)
    assert going.state is State.OUT, "what was in flight there is finished, and that is no return"
    replicas.later(PROBE_SECONDS)
    due = dict(replicas.to_probe())
    replicas.probed(going, due[going], described(address=going.address, listed=[staying]))
    assert replicas.in_rotation == [staying]


def test_without_anybody_in_rotation_those_that_are_out_are_tried_in_turn_and_others_last(make):
    replicas = make(A, B, C)
    assert replicas.states() == {A: State.IN, B: State.OUT, C: State.OUT}
    replicas.other(replicas.call(), "g")
    assert replicas.call(1).replica.address == B
    assert replicas.call(1, B).replica.address == C
    assert replicas.call(1, B, C) is None
    for address in (B, C):
        assert not replicas.all_other()
        flight = replicas.take(1, {B, C} - {address})
        replicas.other(flight, "h")
    assert replicas.all_other()
    replicas.other(replicas.take(1, {B, C}), "")  # it refuses a query, and does not say what it is
    assert replicas.others() == {A: "g", B: "h", C: "h"}
    assert replicas.asked() == A
    assert replicas.states()[A] is State.IN, "it has changed back"


def test_a_teacher_that_was_listed_is_waited_for_where_only_another_is_left(make):
    """It is found through another teacher's address, crashes, and is started again somewhere else."""
    replicas = make(A)
    replicas.expect("", "f")
    flight = replicas.call()
    replicas.learn([*listing(A, fingerprint="g"), *listing(B)])
    replicas.other(flight, "g")
    assert replicas.asked() == B
    replicas.pin("t", "f")
    replicas.lost(replicas.call(), "gone")
    for _ in range(3):
        replicas.learn(listing(A, fingerprint="g"))
    assert replicas.addresses == [A]
    assert not replicas.all_other()
    assert replicas.others() == {A: "g"}
    replicas.learn([*listing(A, fingerprint="g"), *listing(C)])
    replicas.probe(C)
    assert replicas.asked() == C


# ---------------------------------------------------------------- who hangs


def test_a_replica_is_left_after_a_multiple_of_its_own_p99_and_all_its_calls_go_elsewhere(make):
    replicas = make(A, listed=(A, B), latency=3.0)
    flights = [replicas.call() for _ in range(6)]
    hung = [flight for flight in flights if flight.replica.address == A]
    for flight in flights:
        if flight not in hung:
            replicas.answered(flight)
    replicas.later(P99_MULTIPLE * 3.0)
    replicas.leave_the_hung()
    assert not hung[0].link.left
    replicas.later(0.1)
    replicas.leave_the_hung()
    assert all(flight.link.left and is_closed(flight.link) for flight in hung)
    assert replicas.in_rotation == [B]
    for flight in hung:
        replicas.dropped(flight)
    assert replicas.member(A).samples == 0
    assert not is_closed(replicas.member(A).link), "there is a fresh one for the last resort"


def test_the_floor_and_the_ceiling_of_patience(make):
    quick = make(A, listed=(A, B), latency=0.001)
    flight = quick.call()
    quick.later(LEAST_PATIENCE)
    quick.leave_the_hung()
    assert not flight.link.left
    quick.later(0.1)
    quick.leave_the_hung()
    assert flight.link.left
    slow = make(A, listed=(A, B), latency=TIMEOUT)
    flight = slow.call()
    slow.later(TIMEOUT / 2 + 1)
    slow.leave_the_hung()
    assert flight.link.left, "the other half of the time is for the next one"


def test_the_only_one_in_rotation_is_waited_for_until_another_comes(make):
    replicas = make(A, listed=(A,))
    flight = replicas.call()
    replicas.later(100)
    replicas.leave_the_hung()
    assert not flight.link.left
    replicas.learn(listing(A, B))
    replicas.leave_the_hung()
    assert not flight.link.left
    replicas.probe(B)
    replicas.leave_the_hung()
    assert flight.link.left


def test_a_replica_that_answers_one_call_after_another_does_not_hang(make):
    replicas = make(A, listed=(A, B))
    first = replicas.call()
    for _ in range(20):
        flight = replicas.call(1, {A: B, B: A}[first.replica.address])
        replicas.later(1)
        replicas.answered(flight)
        replicas.leave_the_hung()
    assert not first.link.left
    replicas.refused(replicas.call(1, {A: B, B: A}[first.replica.address]))  # a full queue is no progress
    replicas.later(P99_MULTIPLE + 1)
    replicas.leave_the_hung()
    assert first.link.left


def test_where_all_are_slow_each_is_left_a_few_times_and_no_more(make):
    """Both need 8 s for each call from one moment on, and 0.1 s did before."""
    replicas = make(A, listed=(A, B))
    left = 0
    for _ in range(50):
        flight = replicas.call()
        for _ in range(8):
            replicas.later(1)
            replicas.probe(A, B)
            replicas.leave_the_hung()
            if flight.link.left:
                left += 1
                replicas.dropped(flight)
                break
        else:
            replicas.answered(flight)
    assert 2 <= left <= 4


def test_one_that_came_back_and_hangs_again_is_left_as_soon_as_the_first_time(make):
    replicas = make(A, listed=(A, B))
    for _ in range(3):
        while (flight := replicas.call()).replica.address != A:
            replicas.answered(flight)
        replicas.later(LEAST_PATIENCE + 0.1)
        replicas.leave_the_hung()
        assert flight.link.left
        replicas.dropped(flight)
        replicas.later(PROBE_SECONDS)
        replicas.probe(A)
        while replicas.asked() != A:
            pass


def test_one_that_answers_probes_and_nothing_else_is_tried_ever_more_rarely(make):
    replicas = make(A, listed=(A, B))
    broken = replicas.member(A)
    pauses = []
    for _ in range(7):
        replicas._leave(broken)
        began = replicas.clock.now
        while broken.state is State.OUT:
            replicas.later(0.5)
            replicas.probe(A)
        pauses.append(replicas.clock.now - began)
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 30, 30], abs=0.5)
    broken.strikes = 2000  # after some seventeen hours
    replicas._leave(broken)
    replicas.later(30)
    replicas.probe(A)
    while replicas.asked() != A:
        pass
    assert broken.strikes == 0


# ---------------------------------------------------------------- what comes late


def test_a_late_failure_of_a_link_that_was_given_up_says_nothing_of_the_present(make):
    replicas = make(A, listed=(A, B))
    flights = [replicas.call(), replicas.call()]
    late = next(flight for flight in flights if flight.replica.address == A)
    replicas.answered(next(flight for flight in flights if flight is not late))
    replicas.later(LEAST_PATIENCE + 1)
    replicas.leave_the_hung()
    replicas.later(PROBE_SECONDS)
    replicas.probe(A)
    assert replicas.in_rotation == [A, B]
    replicas.lost(late, "its channel was closed")
    assert replicas.in_rotation == [A, B]
    other = replicas.call()
    replicas.other(other, "g")
    assert other.replica.state is State.OTHER


def test_a_late_answer_is_no_return(make):
    replicas = make(A, listed=(A, B))
    late = replicas.call()
    replicas.later(LEAST_PATIENCE + 1)
    replicas.leave_the_hung()
    replicas.answered(late)  # it was on its way when the link was closed
    assert late.replica.state is State.OUT


def test_several_calls_that_are_lost_together_are_one_failure(make):
    replicas = make(A, listed=(A, B))
    flights = [replicas.call() for _ in range(8)]
    lost = [flight for flight in flights if flight.replica.address == A]
    assert len(lost) == 4
    for flight in lost:
        replicas.lost(flight, "gone")
    assert lost[0].replica.strikes == 1
    replicas.later(PROBE_SECONDS)
    assert replicas.probe() == [A]


def test_a_replica_that_comes_back_keeps_its_old_link_until_its_last_call(make):
    replicas = make(A, listed=(A, B))
    going_on, failing = [flight for flight in [replicas.call() for _ in range(4)] if flight.replica.address == A]
    old = going_on.link
    replicas.lost(failing, "draining")
    replicas.later(PROBE_SECONDS)
    replicas.probe(A)
    assert replicas.member(A).link is not old
    assert not is_closed(old)
    replicas.answered(going_on)
    assert is_closed(old)
    assert len(replicas._links) == 2


def test_one_that_was_forgotten_finishes_its_calls_and_is_watched_until_then(make):
    replicas = make(A, listed=(A, B, C))
    flights = {flight.replica.address: flight for flight in [replicas.call() for _ in range(3)]}
    for _ in range(3):
        replicas.learn(listing(A))
    assert replicas.addresses == [A]
    replicas.answered(flights[B])
    assert is_closed(flights[B].link)
    replicas.later(LEAST_PATIENCE + 1)
    replicas.answered(flights[A])
    replicas.leave_the_hung()
    assert flights[C].link.left
    replicas.dropped(flights[C])
    assert len(replicas._links) == 1


@pytest.mark.parametrize("meanwhile", ["forgotten", "found", "come back under the same address"])
def test_a_probe_that_ends_late_changes_nothing(make, meanwhile):
    replicas = make(A, listed=(A,))
    replicas.learn(listing(A, B))
    ((replica, link),) = replicas.to_probe()
    if meanwhile == "found":
        replicas.lost(next(f for f in [replicas.call()] if f.replica.address == A), "gone")
        replicas.answered(replicas.call())  # the last resort
        assert replica.state is State.IN
    else:
        for _ in range(3):
            replicas.learn(listing(A))
        if meanwhile != "forgotten":
            replicas.learn(listing(A, B))
    states = replicas.states()
    replicas.probed(replica, link, None, "nobody there")
    replicas.probed(replica, link, described("g"))
    replicas.probed(replica, link, described())
    assert replicas.states() == states
    assert is_closed(link)


def test_the_only_one_in_rotation_hangs_and_its_successor_is_found_through_the_address_that_was_given(make):
    replicas = make("balancer:1", listed=(A,))
    assert {replicas.someone(number)[0].address for number in range(2)} == {"balancer:1", A}
    flight = replicas.call()
    replicas.later(100)
    replicas.learn(listing(B))
    replicas.probe(B)
    replicas.leave_the_hung()
    assert flight.link.left
    replicas.dropped(flight)
    assert replicas.asked() == B


def test_a_probe_is_not_begun_twice(make):
    replicas = make(A, listed=(A,))
    replicas.learn(listing(A, B))
    ((replica, link),) = replicas.to_probe()
    replicas.later(10 * PROBE_SECONDS)
    assert replicas.to_probe() == []
    replicas.probed(replica, link, described("g"))
    assert replicas.others() == {B: "g"}
    replicas.later(PROBE_SECONDS)
    assert replicas.probe() == [B]
    assert replica.state is State.OUT
    replicas.later(PROBE_SECONDS)
    assert replicas.probe(B) == [B]
    assert replicas.in_rotation == [A, B]


def test_what_cannot_be_reached_is_told_once(make, caplog):
    replicas = make(A)
    replicas.learn(listing(A, B))
    for _ in range(5):
        replicas.probe()
        replicas.later(PROBE_SECONDS)
    assert caplog.text.count("127.0.0.1:2: is listed as a replica, but cannot be used: nobody there") == 1


def test_all_links_are_closed_and_later_ones_too(make):
    replicas = make(A, listed=(A, B))
    flight = replicas.call()
    replicas.lost(replicas.call(1, flight.replica.address), "gone")
    replicas.later(PROBE_SECONDS)
    ((replica, link),) = replicas.to_probe()
    replicas.close()
    assert is_closed(link)
    assert is_closed(flight.link)
    replicas.probed(replica, link, described())
    replicas.dropped(flight)
    replicas.learn(listing(A, B, C))
    assert replicas.addresses == [A, B]
    later = replicas.call()
    assert is_closed(later.link)
