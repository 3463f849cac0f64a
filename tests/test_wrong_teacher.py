"""Training stops when the teacher does not understand the data, and only then; `check` says so before it begins."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from student_worker import TeacherClient, Unix
from student_worker.check import check
from student_worker.data import load
from student_worker.errors import InvalidQuery, TeacherMisunderstands
from tests.asking import put
from tests.serving import serving
from tests.teachers import save

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.25, 0.25)


def to_float(x):
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (x.float() / 255 - mean) / std


def two_digits():
    """Real digits, of low contrast, in colour: the label is the red one; the blue one is another item's."""
    data = load("digits")

    def coloured(digits, shift):
        base = np.array(MEAN, np.float32).reshape(-1, 1, 1) * 255
        planes = np.concatenate([digits, np.zeros_like(digits), np.roll(digits, shift, axis=0)], axis=1) / 255
        return (base + 40 * (planes - 0.4)).round().astype(np.uint8)

    return replace(
        data, name="two-digits", train_x=coloured(data.train_x, 1), test_x=coloured(data.test_x, 1), mean=MEAN, std=STD
    )


def network():
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48 * 16, 10),
    )


class NormalisesItself(nn.Module):
    """Normalises what the server has normalised already: `double` serves the same weights by another factory."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net((x - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1))


def double():
    return NormalisesItself()


@pytest.fixture(scope="module")
def data():
    return two_digits()


@pytest.fixture(scope="module")
def trained(data):
    """A teacher of 95 % or so, trained here in a few seconds."""
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    x, y = to_float(torch.from_numpy(data.train_x)), torch.from_numpy(data.train_y)
    for _ in range(15):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    net.eval()
    top1 = (net(to_float(torch.from_numpy(data.test_x))).argmax(1).numpy() == data.test_y).mean()
    assert top1 > 0.9
    return net, float(top1)


@pytest.fixture(scope="module", params=["declared", "undeclared"])
def teacher(request, trained, data, tmp_path_factory):
    """A server of the trained teacher, which declares its accuracy or does not."""
    net, top1 = trained
    description = {
        "inputs": [{"name": "x", "shape": [3, 8, 8], "normalisation": {"mean": MEAN, "std": STD}}],
        "outputs": [{"name": "logits", "classNames": data.class_names}],
    }
    if request.param == "declared":
        description["outputs"][0]["top1"] = top1
    weights = save(net, tmp_path_factory.mktemp("teacher") / "net.safetensors", description)
    with serving(model="tests.test_wrong_teacher:network", weights=weights, grpc_port=0, http_port=0) as server:
        yield server


@pytest.fixture(scope="module")
def doubly_normalising(trained, tmp_path_factory):
    net, top1 = trained
    module = NormalisesItself()
    module.net.load_state_dict(net.state_dict())
    description = {
        "inputs": [{"name": "x", "shape": [3, 8, 8], "normalisation": {"mean": MEAN, "std": STD}}],
        "outputs": [{"name": "logits", "top1": top1}],  # a convolution shrugs at scale: undeclared, this can be missed
    }
    weights = save(module, tmp_path_factory.mktemp("teacher") / "double.safetensors", description)
    with serving(model="tests.test_wrong_teacher:double", weights=weights, grpc_port=0, http_port=0) as server:
        yield server


def distil(server, data, *, to_teacher=None, labels=None, steps=30, **options):
    """Some steps of a student's training, with labels, as a user would write them."""
    torch.manual_seed(1)
    student = network()
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    labels = data.train_y if labels is None else labels
    order = np.random.default_rng(0).permutation(len(labels))
    loader = (
        (torch.from_numpy(data.train_x[items]), torch.from_numpy(labels[items]))
        for items in np.array_split(np.resize(order, steps * 64), steps)
    )
    with TeacherClient(server.grpc_address, job="wrong") as teacher:
        unix = Unix(teacher, to_teacher=to_teacher, to_student=to_float, **options)
        with closing(unix.batches(loader, student)) as batches:
            for b in batches:
                optimizer.zero_grad()
                unix.criterion(student(b.x), b).backward()
                optimizer.step()
        return unix.steps


METHODS = [{}, {"keep": 1.0, "strategy": "random", "mixing": "none"}]


@pytest.mark.parametrize("method", METHODS, ids=["unix", "kd"])
def test_the_right_teacher_is_left_alone(teacher, data, method):
    assert distil(teacher, data, **method) == 30


@pytest.mark.parametrize("method", METHODS, ids=["unix", "kd"])
def test_swapped_channels_stop_the_training(teacher, data, method):
    with pytest.raises(TeacherMisunderstands, match=r"normalisation.*class order.*layout"):
        distil(teacher, data, to_teacher=lambda x: x.flip(1), **method)


@pytest.mark.parametrize("method", METHODS, ids=["unix", "kd"])
def test_permuted_classes_stop_the_training_and_are_named(teacher, data, method):
    permutation = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    with pytest.raises(TeacherMisunderstands, match=r"Likely culprit: class order.*its \d is labelled \d"):
        distil(teacher, data, labels=permutation[data.train_y], **method)


def test_two_swapped_classes_of_ten_are_enough(teacher, data):
    permutation = np.array([0, 1, 2, 8, 4, 5, 6, 7, 3, 9])
    with pytest.raises(TeacherMisunderstands, match=r"its 3 is labelled 8|its 8 is labelled 3"):
        distil(teacher, data, labels=permutation[data.train_y], steps=60)


@pytest.mark.parametrize("method", METHODS, ids=["unix", "kd"])
def test_normalisation_applied_twice_by_the_student_stops_the_training(teacher, data, method):
    with pytest.raises(InvalidQuery, match=r"leave the teacher's range.*normalised exactly once"):
        distil(teacher, data, to_teacher=lambda x: to_float(to_float(x) * 255), **method)


@pytest.mark.parametrize("method", METHODS, ids=["unix", "kd"])
def test_normalisation_applied_twice_by_the_teacher_stops_the_training(doubly_normalising, data, method):
    with pytest.raises(TeacherMisunderstands, match="Suspects: normalisation"):
        distil(doubly_normalising, data, **method)


def test_check_passes_the_right_teacher(teacher, data):
    with TeacherClient(teacher.grpc_address, job="check") as client:
        assert "understands two-digits: top-1 " in check(client, data, data.train_y, 256)


def test_check_does_not_claim_what_a_few_samples_cannot_show(teacher, data):
    with TeacherClient(teacher.grpc_address, job="check") as client:
        assert "may or may not understand" in check(client, data, (data.train_y + 1) % 10, 3)
        assert "may or may not understand" in check(client, data, data.train_y, 1)
        assert " understands two-digits" in check(client, data, data.train_y, 20)


def test_check_names_the_culprit(teacher, doubly_normalising, data):
    with TeacherClient(teacher.grpc_address, job="check") as client:
        with pytest.raises(TeacherMisunderstands, match="channels in reverse order the same samples give"):
            check(client, replace(data, train_x=np.ascontiguousarray(data.train_x[:, ::-1])), data.train_y, 256)
        with pytest.raises(TeacherMisunderstands, match="Likely culprit: class order"):
            check(client, data, (data.train_y + 1) % 10, 256)
        with pytest.raises(TeacherMisunderstands, match="class order: the teacher's classes are"):
            check(client, replace(data, class_names=data.class_names[::-1]), data.train_y, 256)
    with TeacherClient(doubly_normalising.grpc_address, job="check") as client:
        with pytest.raises(TeacherMisunderstands, match="normalisation"):
            check(client, data, data.train_y, 256)


def test_what_check_found_out_is_said_though_the_budget_ends_before_the_culprit_is_found(teacher, data):
    put(teacher, "/v1/budgets/default/jobs/poor", unit="samples", limit=256)
    with TeacherClient(teacher.grpc_address, job="poor", cache_namespace="poor") as client:
        with pytest.raises(TeacherMisunderstands, match=r"does not understand this data.* class order"):
            check(client, replace(data, train_x=np.ascontiguousarray(data.train_x[:, ::-1])), data.train_y, 256)
