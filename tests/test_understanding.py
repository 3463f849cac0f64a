import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_worker.errors import TeacherMisunderstands
from student_worker.understanding import Understanding


def samples(n, c, accuracy, seed=0, weights=None):
    """True labels, and the predictions of one who gets `accuracy` of them right and else says any class."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(c) if weights is None else torch.tensor(weights)
    labels = torch.multinomial(weights, n, replacement=True, generator=generator)
    guesses = torch.randint(c, (n,), generator=generator)
    known = torch.rand(n, generator=generator) < accuracy
    return torch.where(known, labels, guesses), labels


def verified(understanding, teacher, labels, student=None, step=37):
    """As Unix does: some more samples each step, each time verified, until it is done."""
    for at in range(0, len(labels), step):
        part = slice(at, at + step)
        understanding.observe(teacher[part], labels[part], None if student is None else student[part])
        understanding.verify()


@pytest.mark.parametrize("c", [2, 3, 10, 100, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_a_right_teacher_passes(c, seed):
    teacher, labels = samples(600, c, 0.9, seed)
    student, _ = samples(600, c, 0.0, seed + 1)
    verified(Understanding(c, declared=0.95), teacher, labels, student)


@pytest.mark.parametrize("c", [2, 10, 100])
@pytest.mark.parametrize("seed", range(10))
def test_a_weak_but_right_teacher_passes(c, seed):
    """Half of it guessed, in the training set's easy half a fair student next to it; declared a little more."""
    teacher, labels = samples(600, c, 0.5, seed)
    student, _ = samples(600, c, 0.45, seed)
    verified(Understanding(c, declared=0.5 + 0.5 / c + 0.05), teacher, labels, student)


@pytest.mark.parametrize("seed", range(10))
def test_a_poor_teacher_of_many_classes_is_still_better_than_chance(seed):
    verified(Understanding(1000), *samples(600, 1000, 0.15, seed))


@pytest.mark.parametrize("weights", [[0.9, 0.1], [0.97, 0.03], [1.0, 0.0], [0.8] + [0.2 / 9] * 9])
@pytest.mark.parametrize("seed", range(10))
def test_uneven_classes_are_no_reason(weights, seed):
    teacher, labels = samples(600, len(weights), 0.85, seed, weights)
    verified(Understanding(len(weights)), teacher, labels)


@pytest.mark.parametrize("seed", range(10))
def test_a_teacher_that_looks_for_the_rare_class_passes(seed):
    """It finds most of the rare class, mistakes a fifth of the common one: less right than always the same."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(600, generator=generator) < 0.12).long()
    right = torch.rand(600, generator=generator) < torch.tensor([0.8, 0.9])[labels]
    verified(Understanding(2), torch.where(right, labels, 1 - labels), labels, step=11)


def test_sorted_classes_are_no_reason():
    teacher, labels = samples(512, 10, 0.9)
    order = labels.argsort(stable=True)
    verified(Understanding(10, declared=0.93), teacher[order], labels[order])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), c=st.sampled_from([2, 5, 10, 50]), accuracy=st.floats(0.6, 1))
def test_false_alarms_are_rare(seed, c, accuracy):
    teacher, labels = samples(512, c, accuracy, seed)
    verified(Understanding(c, declared=min(1.0, accuracy + 0.1)), teacher, labels, samples(512, c, 0.5, seed + 1)[0])


@pytest.mark.parametrize("c", [3, 10, 100])
def test_chance_is_noticed(c):
    understanding = Understanding(c)
    teacher, labels = samples(512, c, 0.0)
    with pytest.raises(TeacherMisunderstands, match="near chance") as caught:
        verified(understanding, teacher, labels)
    assert understanding.n <= 256
    for part in (f"n={understanding.n}", "normalisation", "class order", "channel order", "(chance "):
        assert part in str(caught.value)
    assert "culprit" not in str(caught.value)


def test_chance_of_two_classes_is_noticed_in_the_end():
    with pytest.raises(TeacherMisunderstands, match="near chance"):
        verified(Understanding(2), *samples(512, 2, 0.0))


def test_one_answer_to_everything_is_chance():
    _, labels = samples(512, 10, 0.0)
    with pytest.raises(TeacherMisunderstands, match="near chance"):
        verified(Understanding(10), torch.full_like(labels, 3), labels)


def test_a_blatant_case_is_decided_at_64():
    understanding = Understanding(10)
    labels = torch.arange(64) % 10
    understanding.observe((labels[:63] + 1) % 10, labels[:63])
    understanding.verify()  # too few to say
    understanding.observe((labels[63:] + 1) % 10, labels[63:])
    with pytest.raises(TeacherMisunderstands, match=r"gets 0\.0% right"):
        understanding.verify()


def test_below_the_student():
    teacher, labels = samples(512, 10, 0.5)
    student, _ = samples(512, 10, 0.8)
    with pytest.raises(TeacherMisunderstands, match=r"below the student's own accuracy .*the student's own 8\d\.\d%"):
        verified(Understanding(10), teacher, labels, student)


def test_a_student_slightly_better_is_noise():
    teacher, labels = samples(512, 10, 0.95)
    student, _ = samples(512, 10, 0.97)
    verified(Understanding(10), teacher, labels, student)


def test_far_below_what_it_declares():
    """Channels swapped: the teacher still sees shapes, but not what it was trained on."""
    teacher, labels = samples(512, 10, 0.45)
    with pytest.raises(TeacherMisunderstands, match=r"far below what it declares .*declared by the teacher 95\.0%"):
        verified(Understanding(10, declared=0.95), teacher, labels)
    verified(Understanding(10), teacher, labels)  # nothing declared: nothing to compare with


@pytest.mark.parametrize("c", [2, 10, 100])
def test_permuted_classes_are_named(c):
    understanding = Understanding(c, class_names=[f"class {i}" for i in range(c)])
    teacher, labels = samples(512, c, 0.9)
    with pytest.raises(TeacherMisunderstands, match="Likely culprit: class order") as caught:
        verified(understanding, (teacher + 1) % c, labels)
    assert re.search(r"\(its class (\d+) is labelled class (\d+)", str(caught.value))[1] in {"0", "1"}
    assert understanding.n <= 256


def test_two_swapped_classes_of_ten_are_named():
    teacher, labels = samples(512, 10, 0.95)
    swapped = torch.arange(10)
    swapped[3], swapped[5] = 5, 3
    with pytest.raises(TeacherMisunderstands, match=r"\(its 3 is labelled 5, its 5 is labelled 3\)"):
        verified(Understanding(10), swapped[teacher], labels)


def test_unlabelled_samples_are_not_counted_and_the_limit_holds():
    understanding = Understanding(10, limit=100)
    labels = torch.arange(160) % 10
    labels[::2] = -1
    understanding.observe(labels.clamp_min(0), labels)
    assert (understanding.n, understanding.done) == (80, False)
    understanding.observe(labels.clamp_min(0), labels)
    assert (understanding.n, understanding.done) == (100, True)
    understanding.verify()


def test_labels_beyond_the_teachers_classes_are_wrong_answers():
    teacher, labels = samples(512, 10, 1.0)
    with pytest.raises(TeacherMisunderstands, match="its 0 is labelled 10"):
        verified(Understanding(10), teacher, labels + 10)


def test_refused():
    with pytest.raises(ValueError, match="classes is 1"):
        Understanding(1)
    with pytest.raises(ValueError, match="one class a sample"):
        Understanding(10).observe(torch.zeros(3), torch.zeros(4))
