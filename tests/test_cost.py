import json
from pathlib import Path

import pytest

from student_worker.cost import computation, computation_share

VECTORS = json.loads((Path(__file__).parent / "reference" / "unix_vectors.json").read_text())["cost"]


@pytest.mark.parametrize("case", VECTORS, ids=str)
def test_reference(case):
    share = computation_share(
        batch=case["n"],
        keep=case["k"],
        teacher_flops=case["teacher"],
        student_flops=case["student"],
        backward=case["backward"],
    )
    assert share == pytest.approx(case["share"], abs=1e-6)


@pytest.mark.parametrize(
    ("pair", "ratio", "published"),
    [
        ("vgg13 -> MobileNetV2", 38.17, 77.49),
        ("ResNet50 -> MobileNetV2", 174, 75.57),
        ("ResNet50 -> vgg8", 13.56, 81.43),
        ("resnet32x4 -> ShuffleNetV1", 27.16, 78.43),
        ("resnet32x4 -> ShuffleNetV2", 23.49, 78.92),
        ("wrn40-2 -> ShuffleNetV1", 8.22, 84.79),
        ("wrn40-2 -> wrn16-2", 3.25, 94.06),
        ("wrn40-2 -> wrn40-1", 3.93, 91.88),
        ("resnet56 -> resnet20", 3.06, 94.76),
        ("resnet32x4 -> resnet8x4", 6.12, 87.32),
        ("vgg13 -> vgg8", 2.97, 95.10),
        ("vgg16 -> vgg8", 4.14, 91.29),
    ],
)
def test_published_percentages(pair, ratio, published):
    low, high = (
        100 * computation_share(batch=64, keep=48, teacher_flops=ratio + rounding, student_flops=1)
        for rounding in (0.005, -0.005)  # both columns are published to two decimals
    )
    assert low - 0.005 < published < high + 0.005, pair


def test_the_share_is_a_ratio_of_totals():
    flops = {"teacher_flops": 7e9, "student_flops": 2e9, "backward": 2.0}
    unix = computation(asked=30, scored=40, learnt=30, **flops)
    kd = computation(asked=40, scored=0, learnt=40, **flops)
    assert unix == 30 * 7e9 + 40 * 2e9 + 30 * 3 * 2e9
    assert computation_share(batch=40, keep=30, **flops) == pytest.approx(unix / kd)


def test_limits():
    assert computation_share(batch=64, keep=48, teacher_flops=1e15, student_flops=1) == pytest.approx(0.75)
    assert computation(asked=0, scored=0, learnt=0, teacher_flops=1, student_flops=1) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 65}, "keep is 65: it counts samples of a batch of 64"),
        ({"keep": 0}, "keep is 0"),
        ({"teacher_flops": -1.0}, "teacher_flops is -1.0"),
        ({"student_flops": float("nan")}, "student_flops is nan"),
        ({"backward": float("inf")}, "backward is inf"),
        ({"teacher_flops": 0.0, "student_flops": 0.0}, "both 0"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        computation_share(**({"batch": 64, "keep": 48, "teacher_flops": 2.0, "student_flops": 1.0} | change))
