"""The teacher: whether it loads, what it leaves unsaid, whether a batch runs, and what fits a message and a queue."""

from collections.abc import Iterator
from time import perf_counter

import numpy as np
import torch

from protos import teacher_pb2 as pb
from protos.wire import answers_bytes
from teacher_server.config import ServeSettings
from teacher_server.description import ModelError
from teacher_server.doctor.findings import Finding, from_error, note, ok, problem
from teacher_server.engine import Engine
from teacher_server.model import Teacher, example, load

_MESSAGE_OVERHEAD = 64 * 1024  # as the client reckons
_WRONG_MODEL = "give the --model, --model-arguments, --weights and --description that belong together"


def loaded(settings: ServeSettings) -> tuple[Teacher | None, list[Finding]]:
    """The teacher, where it can be had."""
    try:
        teacher = load(settings, settings)
    except ModelError as error:
        return None, [from_error("teacher", error, _WRONG_MODEL)]
    described = teacher.description
    said = (
        f"{settings.model} with {settings.weights}: {described.outputs[0].shape[0]} classes, "
        f"{described.flops_per_sample / 1e6:.1f} MFLOPs a sample, fingerprint {described.fingerprint}"
    )
    return teacher, [ok("teacher", said)]


def description(described: pb.TeacherDescription) -> Iterator[Finding]:
    """What is not said, and who misses it."""
    unsaid = False
    for one in described.inputs:
        if len(one.shape) == 3 and not one.HasField("normalisation"):
            unsaid = True
            yield note(
                "description",
                f"input {one.name!r} has no normalisation: students may send no pixels, and floats of any range",
                'say it in the description: "normalisation": {"mean": [...], "std": [...]}, of pixels / 255',
            )
    output = described.outputs[0]
    if not output.top1:
        unsaid = True
        yield note(
            "description",
            "no top1: students cannot tell a teacher that is fed wrongly from one that is no better",
            'say its test accuracy in the description: "outputs": [{"name": "logits", "top1": 0.93}]',
        )
    if not unsaid:
        yield ok("description", f"normalisation and top1 ({output.top1:.2%}) are said")


def batch(settings: ServeSettings, teacher: Teacher) -> Iterator[Finding]:
    """One full batch on the device, as warm-up runs it. Takes over the teacher's network."""
    size = settings.max_batch_size
    try:
        engine = Engine(teacher.module, teacher.description, settings, size)
        inputs = {one.name: example(one, size) for one in teacher.description.inputs}
        engine.forward(inputs)
        began = perf_counter()
        answers = engine.forward(inputs)["logits"]
        seconds = perf_counter() - began
    except (torch.OutOfMemoryError, ModelError) as error:
        yield from_error("batch", error, "lower --max-batch-size, or free memory of the device")
        return
    except Exception as error:  # noqa: BLE001 - whatever the network raises
        said = f"a batch of {size} raised {type(error).__name__}: {error}"
        yield problem("batch", said, "mend the network; it must take any number of samples up to --max-batch-size")
        return
    if engine.largest_batch < size:
        said = f"a batch of {size} does not fit the device's memory; {engine.largest_batch} do"
        yield problem("batch", said, f"give --max-batch-size {engine.largest_batch}")
    elif not np.isfinite(answers).all():
        said = f"the answers to {size} plain samples hold NaN or infinity"
        yield problem("batch", said, "look at the weights; with --precision bf16 try fp32")
    else:
        yield ok("batch", f"{size} samples in {seconds * 1000:.1f} ms on {engine.device}")


def limits(settings: ServeSettings, described: pb.TeacherDescription) -> Iterator[Finding]:
    """Messages and queues against a sample and a batch."""
    sample = sum(example(one, 1).nbytes for one in described.inputs)
    spec = pb.OutputSpec(name="logits", encoding=pb.ENCODING_FLOAT32)
    classes = described.outputs[0].shape[0]
    answer = answers_bytes(spec, 2, classes) - answers_bytes(spec, 1, classes)
    room, size = settings.max_message_bytes - _MESSAGE_OVERHEAD, settings.max_batch_size
    fitting = max(0, room) // max(sample, answer)
    said = f"a sample is {sample} bytes, its answer {answer}"
    if not fitting:
        wanted = max(sample, answer) * size + _MESSAGE_OVERHEAD
        yield problem(
            "messages",
            f"{said}: not one fits --max-message-bytes {settings.max_message_bytes}",
            f"give --max-message-bytes {wanted} (a batch)",
        )
    elif fitting < size:
        yield note(
            "messages",
            f"{said}: {fitting} fit a message, less than a batch of {size}",
            f"give --max-message-bytes {max(sample, answer) * size + _MESSAGE_OVERHEAD}, or a smaller --max-batch-size",
        )
    else:
        yield ok("messages", f"{said}; {fitting} fit a message, {size} are a batch")
    yield from _queues(settings, sample)


def _queues(settings: ServeSettings, sample: int) -> Iterator[Finding]:
    size, fine = settings.max_batch_size, True
    for knob, whose, wanted in (
        ("max_queue_size", "a job", size),
        ("max_queue_bytes", "a job", size * sample),
        ("max_tenant_queue_size", "a tenant", settings.max_queue_size),
        ("max_tenant_queue_bytes", "a tenant", settings.max_queue_bytes),
    ):
        bound: int = getattr(settings, knob)
        if bound < wanted:
            fine = False
            less = f"a batch of {size}" if whose == "a job" else "what one of its jobs may"
            flag = f"--{knob.replace('_', '-')}"
            yield note("queues", f"{flag} {bound}: {whose} may have less waiting than {less}", f"give {flag} {wanted}")
    if fine:
        batches = min(settings.max_queue_size // size, settings.max_queue_bytes // (size * sample))
        yield ok("queues", f"a job may have {batches} batches waiting")
