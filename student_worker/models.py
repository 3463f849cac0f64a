"""Small students and teachers for images of 8x8 to 32x32 pixels, and the way to a network of one's own.

All take normalised float images [n, channels, size, size] and give logits [n, classes]. One function serves both
sides: a student is `build("cnn", channels=1, classes=10, size=28)`, and a teacher server gets the same network by
`--model student_worker.models:build --model-arguments '{"name": "cnn", "channels": 1, "classes": 10, "size": 28}'`.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


def mlp(*, channels: int, classes: int, size: int, width: int = 256, depth: int = 2) -> nn.Module:
    """`depth` hidden layers of `width` units."""
    widths = [channels * size * size, *[width] * depth]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def cnn(*, channels: int, classes: int, width: int = 32, convolutions: int = 1) -> nn.Module:
    """Three resolutions of `convolutions` 3x3 convolutions with batch norm, `width`, 2 and 4 times `width` wide."""
    layers: list[nn.Module] = []
    before = channels
    for stage, after in enumerate((width, 2 * width, 4 * width)):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for _ in range(convolutions):
            layers += [_conv(before, after), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
    return _initialised(nn.Sequential(*layers, *_head(before, classes)))


def resnet(*, channels: int, classes: int, depth: int, width: int = 1) -> nn.Module:
    """The CIFAR ResNet of He et al. 2016 (section 4.2), depth 6n + 2, `width` times as wide, projection shortcuts."""
    first = 16 * width
    stem = [_conv(channels, first), nn.BatchNorm2d(first), nn.ReLU()]
    blocks = _blocks(_PostActivation, _per_stage("resnet", depth, 2), first, first)
    return _initialised(nn.Sequential(*stem, *blocks, *_head(4 * first, classes)))


def wrn(*, channels: int, classes: int, depth: int, width: int) -> nn.Module:
    """WRN-depth-width of Zagoruyko & Komodakis 2016 without dropout, depth 6n + 4."""
    blocks = _blocks(_PreActivation, _per_stage("wrn", depth, 4), 16, 16 * width)
    last = 64 * width
    top = [nn.BatchNorm2d(last), nn.ReLU()]
    return _initialised(nn.Sequential(_conv(channels, 16), *blocks, *top, *_head(last, classes)))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn-tiny": partial(cnn, width=8),
    "cnn-small": partial(cnn, width=16),
    "cnn": partial(cnn, convolutions=2),
    "resnet8": partial(resnet, depth=8),
    "resnet20": partial(resnet, depth=20),
    "resnet56": partial(resnet, depth=56),
    "resnet": resnet,
    "wrn-16-1": partial(wrn, depth=16, width=1),
    "wrn-16-2": partial(wrn, depth=16, width=2),
    "wrn-40-1": partial(wrn, depth=40, width=1),
    "wrn-40-2": partial(wrn, depth=40, width=2),
    "wrn": wrn,
}


def build(name: str, *, channels: int, classes: int, size: int, **arguments: Any) -> nn.Module:
    """A network by name, or by `package.module:factory` (looked for in the current directory too).

    name: one of MODELS, or a factory that is called with those of channels, classes, size that it accepts.
    channels, classes, size: of the data; images are square, `size` pixels a side. arguments: passed on as they are.
    Raises ValueError for an unknown name or an argument that the network does not take, ImportError where the module or
    the factory is missing, TypeError when a factory does not give a torch.nn.Module.
    """
    factory = _import(name) if ":" in name else MODELS.get(name)
    if factory is None:
        raise ValueError(f"unknown model {name!r}; one of {', '.join(MODELS)}, or your own as package.module:factory")
    accepted = inspect.signature(factory).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    if unknown := [key for key in arguments if key not in accepted and not takes_any]:
        raise ValueError(f"model {name!r} takes no argument {', '.join(unknown)}; it takes {', '.join(accepted)}")
    of_the_data = {"channels": channels, "classes": classes, "size": size}
    given = {key: value for key, value in of_the_data.items() if takes_any or key in accepted} | arguments
    try:
        inspect.signature(factory).bind(**given)
    except TypeError as error:
        raise ValueError(f"model {name!r}: {error}") from error
    module = factory(**given)
    if not isinstance(module, nn.Module):
        raise TypeError(f"model {name!r} gave a {type(module).__name__}, must give a torch.nn.Module")
    return module


def flops_per_sample(module: nn.Module, shape: Sequence[int]) -> int:
    """Forward FLOPs (a multiply-add is two) for one sample of `shape` (without the batch), by torch's own counter.

    Runs one forward pass of zeros in eval mode, so that nothing in the module changes: every submodule's mode is put
    back and batch-norm statistics stay.
    """
    parameter = next(module.parameters(), torch.empty(0))
    training = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device))
    finally:
        for submodule, mode in training:
            submodule.training = mode
    return int(counter.get_total_flops())


def _import(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"model {name!r} must be written package.module:factory")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except ModuleNotFoundError as error:
        raise ImportError(f"model {name!r}: {error}; looked on sys.path and in {here}") from error
    except AttributeError as error:
        raise ImportError(f"model {name!r}: {error}") from error
    if not callable(target):
        raise TypeError(
            f"model {name!r} is a {type(target).__name__}, must be a function or class that gives a network"
        )
    return target  # type: ignore[no-any-return]


class _PostActivation(nn.Module):
    """Convolution, batch norm, ReLU, twice; the sum before the last ReLU (He et al.)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(before, after, stride), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = _conv(after, after), nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class _PreActivation(nn.Module):
    """Batch norm, ReLU, convolution, twice; a change of shape projects the activated input (the authors' code)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), _conv(before, after, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(after), _conv(after, after)
        self.project = nn.Conv2d(before, after, 1, stride, bias=False) if stride != 1 or before != after else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        shortcut = x if self.project is None else self.project(activated)
        return out + shortcut


def _per_stage(family: str, depth: int, extra: int) -> int:
    """Blocks at each of the three resolutions: n, where depth = 6n + extra."""
    blocks, rest = divmod(depth - extra, 6)
    if blocks < 1 or rest:
        raise ValueError(f"{family} of depth {depth}: depth must be 6n + {extra} (such as {extra + 6} or {extra + 12})")
    return blocks


def _blocks(block: type[_PostActivation | _PreActivation], per_stage: int, before: int, width: int) -> list[nn.Module]:
    """Three resolutions, `width`, 2 and 4 times `width` wide, after a stem that is `before` wide."""
    blocks: list[nn.Module] = []
    for stage, after in enumerate((width, 2 * width, 4 * width)):
        for position in range(per_stage):
            blocks.append(block(before, after, 2 if stage and not position else 1))
            before = after
    return blocks


def _head(features: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]


def _conv(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


def _initialised(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    return module
