"""Small deterministic teachers for the tests, and files of their weights. Factories are named "tests.teachers:tiny"."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TINY: dict[str, Any] = {
    "inputs": [
        {
            "name": "x",
            "shape": [3, 8, 8],
            "normalisation": {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3]},
        }
    ],
    "outputs": [{"name": "logits", "class_names": [f"class {number}" for number in range(10)], "top1": 0.9}],
}
"""Description of `tiny` and `picky`: images of 3x8x8, 10 classes."""

PAIR: dict[str, Any] = {
    "inputs": [
        {"name": "x", "shape": [4], "minimum": [-10], "maximum": [10]},
        {"name": "tokens", "shape": [5], "dtypes": ["DATA_TYPE_INT64"], "minimum": [0], "maximum": [6]},
    ]
}
"""Description of `pair`: 4 floats and 5 tokens out of 7, 3 classes."""

MAGIC = 1.25
"""The value in a sample at which `picky` raises; within the bounds of its inputs in every channel."""


@contextmanager
def _seeded() -> Iterator[None]:
    """The CPU's generator alone: torch.manual_seed would also keep a note for a CUDA that may never start."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def tiny(classes: int = 10) -> nn.Module:
    """A convolutional net with batch norm that is not the identity: [n, 3, 8, 8] -> [n, classes], logits of about 3."""
    with _seeded():
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, classes),
        )
        with torch.no_grad():
            for norm in (net[1], net[4]):
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.2, 0.6)
                norm.weight.uniform_(0.5, 1.5)
            for parameter in net[-1].parameters():
                parameter.mul_(4)
    return net.eval()


class Picky(nn.Module):
    """Raises for a batch with the value MAGIC anywhere; answers NaN for a sample whose first value is its negative."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()

    def forward(self, x: Tensor) -> Tensor:
        if (x == MAGIC).any():
            raise ValueError("a sample has the magic value")
        return torch.where((x.flatten(1)[:, :1] == -MAGIC), torch.nan, self.net(x))


def picky() -> nn.Module:
    return Picky()


class Unhurried(nn.Module):
    """Answers as `tiny` does, after 20 ms a batch in which it takes no CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return self.net(x)


class Pair(nn.Module):
    """x [n, 4] and tokens [n, 5], passed by their names -> {"logits": [n, 3]}."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.cat([x, self.embedding(tokens).mean(1)], dim=1))}


def pair() -> nn.Module:
    with _seeded():
        return Pair().eval()


def save(module: nn.Module, path: Path, description: Mapping[str, Any] | None) -> Path:
    """Writes the weights as safetensors, with the description (protobuf JSON) in the metadata; None leaves it out."""
    metadata = None if description is None else {"preceptor": json.dumps(description)}
    save_file(module.state_dict(), path, metadata)
    return path


def save_tiny(folder: Path) -> Path:
    """The weights file of "tests.teachers:tiny", ready for --weights."""
    return save(tiny(), folder / "tiny.safetensors", TINY)


def save_picky(folder: Path) -> Path:
    """The weights file of "tests.teachers:picky"."""
    return save(picky(), folder / "picky.safetensors", TINY)


def save_pair(folder: Path) -> Path:
    """The weights file of "tests.teachers:pair"."""
    return save(pair(), folder / "pair.safetensors", PAIR)
