import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from protos import teacher_pb2 as pb
from teacher_server.config import EngineConfig, ModelConfig
from teacher_server.model import ModelError, Teacher, example, fingerprint, load
from tests import teachers

FP32 = EngineConfig(device="cpu")


def loaded(weights: Path, model: str = "tests.teachers:tiny", **more: Any) -> Teacher:
    return load(ModelConfig(model=model, weights=weights, **more), FP32)


def described(tmp_path: Path, description: Any, model: str = "tests.teachers:tiny") -> pb.TeacherDescription:
    """What `load` makes of a --description file."""
    path = tmp_path / "description.json"
    path.write_text(description if isinstance(description, str) else json.dumps(description))
    module = teachers.pair() if model.endswith("pair") else teachers.tiny()
    weights = teachers.save(module, tmp_path / "plain.safetensors", None)
    return loaded(weights, model, description=path).description


def tiny_with(**changes: Any) -> dict[str, Any]:
    return {**teachers.TINY, "inputs": [{**teachers.TINY["inputs"][0], **changes}]}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.lstm(x)[0])[:, 0])
        return logits


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


class Probed(nn.Module):
    """Answers whatever `answer` is, to show what is refused."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer


def rows_for_nothing() -> nn.Module:
    return Probed(torch.zeros(2, 10))


def no_logits() -> nn.Module:
    return Probed({"scores": torch.zeros(1, 10)})


def test_a_loaded_teacher_is_the_one_saved_and_says_all_of_itself(tmp_path: Path) -> None:
    teacher = loaded(teachers.save_tiny(tmp_path), name="owl", price_nanos=1500, currency="EUR")
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(teacher.module(x), teachers.tiny()(x))
    assert not teacher.module.training
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())

    described = teacher.description
    (x_input,) = described.inputs
    assert described.name == "owl"
    assert re.fullmatch("[0-9a-f]{32}", described.fingerprint)
    assert list(x_input.dtypes) == [pb.DATA_TYPE_UINT8, pb.DATA_TYPE_FLOAT16, pb.DATA_TYPE_FLOAT32]
    assert list(described.outputs[0].shape) == [10]
    assert described.outputs[0].class_names[3] == "class 3"
    assert described.outputs[0].top1 == 0.9
    assert (described.price.nanos_per_sample, described.price.currency) == (1500, "EUR")
    assert described.precision.policy == "fp32"
    assert described.precision.absolute_tolerance == 1e-4
    # 8x8 positions x 8 filters of 3x3x3, 4x4 positions x 16 filters of 8x3x3, and the last layer; two a multiply-add.
    assert described.flops_per_sample == 2 * (64 * 8 * 27 + 16 * 16 * 72 + 256 * 10)


def test_bounds_follow_from_the_normalisation_and_leave_room_for_float16(tmp_path: Path) -> None:
    (x,) = loaded(teachers.save_tiny(tmp_path)).description.inputs
    for channel, (mean, std) in enumerate(zip([0.5, 0.4, 0.3], [0.25, 0.2, 0.3], strict=True)):
        darkest, brightest = (0 - mean) / std, (1 - mean) / std
        assert x.minimum[channel] <= float(np.float16(darkest)) <= darkest + 0.01
        assert brightest - 0.01 <= float(np.float16(brightest)) <= x.maximum[channel]
        assert x.maximum[channel] - brightest <= 0.0101 / std
        assert (brightest - mean) / std > x.maximum[channel], "normalised twice, white must stand out"


def test_fused_kernels_are_counted(tmp_path: Path) -> None:
    weights = teachers.save(
        Recurrent(), tmp_path / "recurrent.safetensors", {"inputs": [{"name": "x", "shape": [5, 8]}]}
    )
    lstm = 5 * 4 * (8 * 8 + 8 * 8)
    encoder = 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8
    flops = loaded(weights, "tests.test_model:Recurrent").description.flops_per_sample
    assert flops == 2 * (lstm + encoder + 8 * 2)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


def test_several_inputs_are_passed_by_name(tmp_path: Path) -> None:
    teacher = loaded(teachers.save_pair(tmp_path), "tests.teachers:pair")
    x, tokens = teacher.description.inputs
    assert list(x.dtypes) == [pb.DATA_TYPE_FLOAT16, pb.DATA_TYPE_FLOAT32]
    assert list(tokens.dtypes) == [pb.DATA_TYPE_INT64]
    assert list(teacher.description.outputs[0].shape) == [3]


def test_examples_keep_to_the_bounds() -> None:
    tokens = pb.InputDescription(shape=[2], dtypes=[pb.DATA_TYPE_INT32], minimum=[5], maximum=[9])
    np.testing.assert_array_equal(example(tokens, 3), np.full((3, 2), 5, np.int32), strict=True)
    image = pb.InputDescription(shape=[2, 1], dtypes=[pb.DATA_TYPE_UINT8], minimum=[-1, 1], maximum=[1, 2])
    np.testing.assert_array_equal(example(image, 1), np.float32([[[0], [1]]]), strict=True)


def test_one_mean_and_std_stand_for_all_channels(tmp_path: Path) -> None:
    (x,) = described(tmp_path, tiny_with(normalisation={"mean": [0.5], "std": [0.25]})).inputs
    assert list(x.normalisation.mean) == [0.5] * 3
    assert list(x.normalisation.std) == [0.25] * 3
    assert len(x.minimum) == len(x.maximum) == 3


def test_what_the_owner_states_is_kept(tmp_path: Path) -> None:
    stated = {**tiny_with(minimum=[-5], maximum=[5]), "precision": {"absoluteTolerance": 0.5}}
    description = described(tmp_path, stated)
    assert (description.precision.absolute_tolerance, description.precision.relative_tolerance) == (0.5, 0)
    assert (list(description.inputs[0].minimum), list(description.inputs[0].maximum)) == ([-5], [5])


# ------------------------------------------------------------ fingerprint


def test_the_fingerprint_knows_the_weights_not_the_file(tmp_path: Path) -> None:
    description = tmp_path / "description.json"
    description.write_text(json.dumps(teachers.TINY))
    torch.save(teachers.tiny().state_dict(), tmp_path / "tiny.pt")
    a = loaded(teachers.save_tiny(tmp_path)).description
    b = loaded(tmp_path / "tiny.pt", description=description, name="other", price_nanos=7).description
    assert a.fingerprint == b.fingerprint

    relabelled = {**teachers.TINY, "outputs": [{"top1": 0.1}]}
    c = loaded(teachers.save(teachers.tiny(), tmp_path / "c.safetensors", relabelled)).description
    assert a.fingerprint == c.fingerprint


def test_the_fingerprint_changes_with_all_that_changes_an_answer(tmp_path: Path) -> None:
    weights = teachers.save_tiny(tmp_path)
    changed = teachers.tiny()
    with torch.no_grad():
        changed.get_buffer("1.running_var")[0] += 1e-3
    seen = {
        "as it is": loaded(weights).description.fingerprint,
        "a buffer": loaded(teachers.save(changed, tmp_path / "b.safetensors", teachers.TINY)).description.fingerprint,
        "arguments": loaded(weights, model_arguments={"classes": 10}).description.fingerprint,
        "precision": load(
            ModelConfig(model="tests.teachers:tiny", weights=weights), EngineConfig(precision="bf16")
        ).description.fingerprint,
        "std": described(
            tmp_path, tiny_with(normalisation={"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.31]})
        ).fingerprint,
        "no normalisation": described(tmp_path, tiny_with(normalisation=None)).fingerprint,
    }
    assert len(set(seen.values())) == len(seen), seen


def test_the_fingerprint_is_what_its_docstring_says() -> None:
    """Spelt out by hand, so that a change of recipe, which would orphan every cache, shows."""
    module = nn.Linear(2, 1, bias=False)
    module.weight.data = torch.tensor([[1.0, -2.0]])
    x = pb.InputDescription(name="x", shape=[2], normalisation=pb.Normalisation(mean=[0.5], std=[2]))

    def part(data: bytes) -> bytes:
        return len(data).to_bytes(8, "little") + data

    integers = np.array([1, 2], "<i8").tobytes()
    parts = [
        b"m:f", b'{"a": 1}', (1).to_bytes(8, "little"),
        b"weight", b"torch.float32", integers, np.float32([1, -2]).tobytes(),
        b"x", integers[8:], np.float64([0.5]).tobytes(), np.float64([2]).tobytes(),
        b"fp32",
    ]  # fmt: skip
    expected = blake3(b"preceptor.teacher.v1" + b"".join(map(part, parts))).hexdigest(length=16)
    assert fingerprint(module, "m:f", {"a": 1}, [x], "fp32") == expected


def test_the_fingerprint_knows_buffers_that_no_state_dict_holds() -> None:
    fingerprints = []
    for scale in (1.0, 2.0):
        module = nn.Linear(2, 1, bias=False)
        nn.init.ones_(module.weight)
        module.register_buffer("scale", torch.tensor([scale]), persistent=False)
        fingerprints.append(fingerprint(module, "m:f", {}, [], "fp32"))
    assert fingerprints[0] != fingerprints[1]


def test_tied_weights_may_be_saved_once_or_twice(tmp_path: Path) -> None:
    module = Tied()
    description = {"inputs": [{"name": "x", "shape": [4]}]}
    path = tmp_path / "description.json"
    path.write_text(json.dumps(description))
    save_model(module, str(tmp_path / "once.safetensors"))
    torch.save(module.state_dict(), tmp_path / "twice.pt")
    once = loaded(tmp_path / "once.safetensors", "tests.test_model:Tied", description=path)
    twice = loaded(tmp_path / "twice.pt", "tests.test_model:Tied", description=path)
    assert once.description.fingerprint == twice.description.fingerprint
    assert torch.equal(once.module.get_parameter("second.weight"), module.second.weight)


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("no_such_module:f", {}, "No module named 'no_such_module'"),
        ("tests.teachers:no_such_factory", {}, "no_such_factory"),
        ("tests.teachers:tiny", {"width": 3}, "unexpected keyword argument 'width'"),
        ("builtins:dict", {}, "made a dict, not a torch.nn.Module"),
        ("tests.test_model:rows_for_nothing", {}, "does not fit"),
    ],
)
def test_factories_that_do_not_work(tmp_path: Path, model: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=re.escape(said)):
        loaded(teachers.save_tiny(tmp_path), model, model_arguments=arguments)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("tests.test_model:rows_for_nothing", "answered by logits [2, 10]"),
        ("tests.test_model:no_logits", "returned NoneType; logits are"),
    ],
)
def test_networks_that_answer_something_else(tmp_path: Path, model: str, said: str) -> None:
    torch.save({}, tmp_path / "empty.pt")
    path = tmp_path / "description.json"
    path.write_text(json.dumps(teachers.TINY))
    with pytest.raises(ModelError, match=re.escape(said)):
        loaded(tmp_path / "empty.pt", model, description=path)


def test_a_factory_in_the_current_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_alone.py").write_text("from tests.teachers import tiny\n\nclass Nets:\n    make = tiny\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    assert loaded(teachers.save_tiny(tmp_path), "mine_alone:Nets.make").description.flops_per_sample > 0


def test_weights_that_do_not_fit_are_named_with_both_shapes(tmp_path: Path) -> None:
    state = teachers.tiny(classes=7).state_dict()
    del state["1.running_mean"]
    state["head.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "other.safetensors", {"preceptor": json.dumps(teachers.TINY)})
    with pytest.raises(ModelError) as caught:
        loaded(tmp_path / "other.safetensors")
    message = str(caught.value)
    for said in (
        "other.safetensors does not fit tests.teachers:tiny",
        "missing '1.running_mean' [8]",
        "unexpected 'head.bias' [7]",
        "'7.weight' is [7, 256] in the file but [10, 256] in the network",
        "and 1 more such",
        "--model-arguments",
    ):
        assert said in message


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    class Unpickled:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("never run",)

    torch.save(Unpickled(), tmp_path / "code.pt")
    torch.save({"epoch": 3, "state_dict": teachers.tiny().state_dict()}, tmp_path / "checkpoint.pt")
    (tmp_path / "rubbish.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "rubbish.pt").write_bytes(b"")
    (tmp_path / "weights.bin").write_bytes(b"")
    for name, said in {
        "absent.pt": "no file at",
        "code.pt": "cannot be read as a state dict",
        "checkpoint.pt": "with the keys epoch, state_dict, not a state dict",
        "rubbish.safetensors": "cannot be read as a state dict",
        "rubbish.pt": "cannot be read as a state dict",
        "weights.bin": "neither .safetensors nor .pt",
    }.items():
        with pytest.raises(ModelError, match=re.escape(said)) as caught:
            loaded(tmp_path / name)
        assert name in str(caught.value)


def test_without_a_description_an_example_is_shown_that_works(tmp_path: Path) -> None:
    weights = teachers.save(teachers.tiny(), tmp_path / "plain.safetensors", None)
    with pytest.raises(ModelError, match="--description") as caught:
        loaded(weights)
    example = json.loads(str(caught.value).partition("For example:\n")[2])
    example["inputs"][0]["shape"] = [3, 8, 8]
    del example["outputs"][0]["class_names"]
    assert described(tmp_path, example).outputs[0].top1 == 0.93


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ("{", "description.json: Failed to load JSON"),
        ("[]", "description.json: "),
        ({"inptus": []}, '"inptus"'),
        ({"inputs": []}, "inputs are named []"),
        ({"inputs": teachers.TINY["inputs"] * 2}, "inputs are named ['x', 'x']"),
        (tiny_with(shape=[]), "shape []; give the shape of one sample"),
        (tiny_with(shape=[3, 0, 8]), "shape [3, 0, 8]"),
        (tiny_with(shape=[3, 4, 4]), "a forward pass of one sample (x torch.float32 [1, 3, 4, 4]) raised RuntimeError"),
        (tiny_with(normalisation={"mean": [0.5, 0.5], "std": [1]}), "2 values of mean for 3 channels"),
        (tiny_with(normalisation={"mean": [0.5]}), "0 values of std for 3 channels"),
        (tiny_with(normalisation={"mean": [0.5], "std": [0.2, 0, 0.2]}), "every std is above 0"),
        (tiny_with(normalisation={"mean": ["NaN"], "std": [1]}), "is not finite"),
        (tiny_with(normalisation={"mean": [125.3], "std": [63]}), "divide mean and std by 255"),
        (tiny_with(dtypes=["DATA_TYPE_UNSPECIFIED"]), "dtypes ['DATA_TYPE_UNSPECIFIED']"),
        (tiny_with(dtypes=[77]), "dtypes ['77']"),
        (tiny_with(dtypes=["DATA_TYPE_UINT8", "DATA_TYPE_INT64"]), "not both"),
        (tiny_with(dtypes=["DATA_TYPE_INT64"]), "cannot be normalised"),
        (tiny_with(dtypes=["DATA_TYPE_INT64"], normalisation=None), "integers need `minimum` and `maximum`"),
        (tiny_with(minimum=[0]), "1 values of minimum and 0 of maximum for 3 channels"),
        (tiny_with(minimum=[0, 0], maximum=[1, 1]), "2 values of minimum and 2 of maximum"),
        (tiny_with(minimum=[1], maximum=[0]), "each minimum is below its maximum"),
        ({**teachers.TINY, "outputs": [{"name": "features"}]}, "outputs ['features']"),
        ({**teachers.TINY, "outputs": [{"shape": [12]}]}, "logits have shape [12], but the network answers [10]"),
        ({**teachers.TINY, "outputs": [{"classNames": ["cat", "dog"]}]}, "2 class_names, but the network answers 10"),
        ({**teachers.TINY, "outputs": [{"top1": 93}]}, "top1 93; it is a share"),
    ],
)
def test_descriptions_that_contradict_themselves_or_the_network(tmp_path: Path, description: Any, said: str) -> None:
    with pytest.raises(ModelError, match=re.escape(said)):
        described(tmp_path, description)


def test_an_absent_description_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.json: no such file"):
        loaded(teachers.save_tiny(tmp_path), description=tmp_path / "nowhere.json")
