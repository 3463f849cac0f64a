"""A checkpoint: weights in safetensors, the record of the run in JSON, each in place whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from google.protobuf import json_format
from safetensors.torch import save
from torch import Tensor, nn

from protos import teacher_pb2 as pb
from student_worker.data import Dataset


def save_checkpoint(folder: Path, epoch: int, student: nn.Module, data: Dataset, record: Mapping[str, Any]) -> Path:
    """Writes `epoch-NNNN.safetensors` and `epoch-NNNN.json` (`record`); returns the weights' path.

    The weights carry what a teacher server needs to serve them: preprocessing, class names, `record["accuracy"]`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in student.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen or not tensor.numel():  # tied weights are one tensor, and safetensors takes it once
            seen.add(place)
            state[name] = tensor.detach().cpu().contiguous()
    description = json_format.MessageToJson(describe(data, record["accuracy"]), indent=None)
    path = checkpoint_path(folder, epoch)
    # The record first: where a run is interrupted in between, there are no weights without one.
    write_whole(path.with_suffix(".json"), json.dumps(record, indent=2, default=str).encode() + b"\n")
    write_whole(path, save(state, metadata={"preceptor": description}))
    return path


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Where an epoch's weights are; its record is beside them."""
    return folder / f"epoch-{epoch:04d}.safetensors"


def describe(data: Dataset, top1: float) -> pb.TeacherDescription:
    """What a network trained on `data` takes and gives, as a teacher server reads it from the weights' metadata."""
    return pb.TeacherDescription(
        inputs=[
            pb.InputDescription(
                name="x", shape=data.shape, normalisation=pb.Normalisation(mean=data.mean, std=data.std)
            )
        ],
        outputs=[pb.OutputDescription(name="logits", class_names=data.class_names, top1=top1)],
    )


def write_whole(path: Path, content: bytes) -> None:
    """Whoever reads `path`, at any time and whatever is killed, finds the old content or the new; never a part."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:  # the disk is full, or Ctrl-C
        part.unlink(missing_ok=True)
        raise
