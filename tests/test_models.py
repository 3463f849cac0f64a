import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from student_worker.models import MODELS, build, flops_per_sample

FAMILIES = {"resnet": {"depth": 14}, "wrn": {"depth": 10, "width": 1}}  # the names that need arguments


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        *((name, 1, 28) for name in MODELS),
        *((name, *data) for name in ("mlp", "cnn", "resnet8", "wrn-16-1") for data in ((1, 8), (3, 32))),
    ],
)
def test_models_take_images_of_all_sizes(name: str, channels: int, size: int) -> None:
    module = build(name, channels=channels, classes=7, size=size, **FAMILIES.get(name, {}))
    logits = module.eval()(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # on CIFAR-100; published in millions: 2.26, 0.70, 0.57, 0.28 (Tian et al. 2020, RepDistiller)
        ("wrn-40-2", 2_255_156),
        ("wrn-16-2", 703_284),
        ("wrn-40-1", 569_780),
        ("resnet20", 278_324),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    module = build(name, channels=3, classes=100, size=32)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


def test_flops_counted_by_hand() -> None:
    assert flops_per_sample(nn.Linear(30, 4), (30,)) == 2 * 30 * 4
    # 3x3 convolutions at 28, 14, 7 pixels and the linear layer; a multiply-add is two
    by_hand = 2 * (28**2 * 9 * 1 * 16 + 14**2 * 9 * 16 * 32 + 7**2 * 9 * 32 * 64 + 64 * 10)
    assert flops_per_sample(build("cnn-small", channels=1, classes=10, size=28), (1, 28, 28)) == by_hand


def test_counting_flops_changes_nothing() -> None:
    module = build("resnet8", channels=1, classes=10, size=8).train()
    module[1].eval()  # a frozen batch norm must stay frozen
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [submodule.training for submodule in module.modules()]
    random_state = torch.get_rng_state()
    first = flops_per_sample(module, (1, 8, 8))
    assert flops_per_sample(deepcopy(module).half(), (1, 8, 8)) == first > 0
    assert modes == [submodule.training for submodule in module.modules()]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_modes_return_after_a_failure() -> None:
    module = build("cnn-tiny", channels=1, classes=10, size=8)
    with pytest.raises(RuntimeError):
        flops_per_sample(module, (3, 8, 8))
    assert module.training


def test_the_same_seed_gives_the_same_network() -> None:
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(build("wrn-16-1", channels=1, classes=10, size=8).state_dict())
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())


def test_what_the_server_passes_as_json() -> None:
    arguments = json.loads('{"name": "cnn", "channels": 1, "classes": 10, "size": 28, "width": 8}')
    assert isinstance(build(**arguments), nn.Module)


def test_a_factory_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets_of_this_test.py").write_text(
        "from torch import nn\n"
        "def few(classes, hidden=3): return nn.Linear(hidden, classes)\n"
        "def every(**given): return nn.Linear(given['size'], given['classes'])\n"
        "class Space: net = few\n"
        "def wrong(): return 'a string'\n"
        "constant = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    data = {"channels": 1, "classes": 5, "size": 8}
    assert build("my_nets_of_this_test:few", **data).weight.shape == (5, 3)
    assert build("my_nets_of_this_test:few", **data, hidden=4).weight.shape == (5, 4)
    assert build("my_nets_of_this_test:Space.net", **data).weight.shape == (5, 3)
    assert build("my_nets_of_this_test:every", **data).weight.shape == (5, 8)
    with pytest.raises(ValueError, match="takes no argument depth; it takes classes, hidden"):
        build("my_nets_of_this_test:few", **data, depth=4)
    with pytest.raises(TypeError, match=r"gave a str, must give a torch.nn.Module"):
        build("my_nets_of_this_test:wrong", **data)
    with pytest.raises(TypeError, match="is a int, must be a function or class"):
        build("my_nets_of_this_test:constant", **data)
    with pytest.raises(ImportError, match=r"my_nets_of_this_test:absent.*no attribute 'absent'"):
        build("my_nets_of_this_test:absent", **data)
    with pytest.raises(ImportError, match=f"No module named 'no_such_package'; looked on sys.path and in {tmp_path}"):
        build("no_such_package:net", **data)


@pytest.mark.parametrize(
    ("name", "arguments", "saying"),
    [
        ("wrn-16-4", {}, "unknown model 'wrn-16-4'; one of mlp, .*wrn-16-2.*package.module:factory"),
        (":net", {}, "must be written package.module:factory"),
        ("mlp", {"heads": 2}, "takes no argument heads"),
        ("wrn", {"depth": 15, "width": 1}, r"wrn of depth 15: depth must be 6n \+ 4"),
        ("resnet", {"depth": 2}, r"resnet of depth 2: depth must be 6n \+ 2"),
        ("wrn", {"depth": 16}, "model 'wrn': missing a required .*argument: 'width'"),
    ],
)
def test_errors_name_the_fix(name: str, arguments: dict[str, int], saying: str) -> None:
    with pytest.raises(ValueError, match=saying):
        build(name, channels=1, classes=10, size=28, **arguments)
