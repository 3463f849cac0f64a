"""What a teacher says of a query, decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protos import teacher_pb2 as pb
from protos import wire
from student_worker.errors import FingerprintChanged, TeacherFailed
from student_worker.losses import TopK

_SOURCES = {pb.SOURCE_COMPUTED: "computed", pb.SOURCE_CACHED: "cached", pb.SOURCE_COALESCED: "coalesced"}


@dataclass(frozen=True)
class Answer:
    """What the teacher said of a query's n samples."""

    logits: Tensor | TopK
    """float32 [n, classes], or the k largest of them with the mass of the rest."""
    sources: tuple[str, ...] = field(default=(), repr=False)
    """For each sample `computed`, `cached` or `coalesced`."""
    cost: pb.Cost = field(default_factory=pb.Cost)
    budgets: tuple[pb.Budget, ...] = ()
    fingerprint: str = ""
    description: pb.TeacherDescription = field(default_factory=pb.TeacherDescription, repr=False)
    """Who answered."""


def decoded(reply: pb.LabelResponse, n: int, description: pb.TeacherDescription, encoding: pb.Encoding) -> Answer:
    """The answer to n samples, asked in that encoding of the teacher that `description` describes.

    Raises FingerprintChanged where another teacher answered, TeacherFailed where the reply contradicts itself.
    """
    if reply.fingerprint != description.fingerprint:
        raise FingerprintChanged(
            f"fingerprint: asked {description.fingerprint}, answered by {reply.fingerprint}; begin a new run"
        )
    try:
        values = wire.decode_answers(reply.answers[0])
    except (wire.MalformedMessage, IndexError) as error:
        raise TeacherFailed(f"the server's reply cannot be read: {error}") from error
    asked, given = (
        (encoding, [n, *description.outputs[0].shape]),
        (reply.answers[0].encoding, [*reply.answers[0].shape]),
    )
    if asked != given:
        raise TeacherFailed(f"the server's reply has encoding and shape {given}, asked were {asked}")
    logits: Tensor | TopK
    if isinstance(values, wire.TopK):
        top, indices, mass = map(torch.from_numpy, (values.values, values.indices, values.tail_mass))
        logits = TopK(top, indices.long(), mass, values.temperature)
    else:
        logits = torch.from_numpy(values)
    if unknown := set(reply.sources) - _SOURCES.keys():
        raise TeacherFailed(f"the server's reply has sources {unknown}, which are not known here")
    sources = tuple(_SOURCES[source] for source in reply.sources)
    return Answer(logits, sources, reply.cost, tuple(reply.budgets), reply.fingerprint, description)


def concatenated(answers: Sequence[Answer]) -> Answer:
    """The answers to a query's parts as one, in their order."""
    first = answers[0]
    logits: Tensor | TopK
    if isinstance(first.logits, TopK):
        tops = [answer.logits for answer in answers if isinstance(answer.logits, TopK)]
        logits = TopK(
            torch.cat([top.values for top in tops]),
            torch.cat([top.indices for top in tops]),
            torch.cat([top.tail_mass for top in tops]),
            first.logits.temperature,
        )
    else:
        logits = torch.cat([answer.logits for answer in answers if isinstance(answer.logits, Tensor)])
    cost = pb.Cost(
        samples=sum(answer.cost.samples for answer in answers),
        money_nanos=sum(answer.cost.money_nanos for answer in answers),
        currency=first.cost.currency,
        flops=sum(answer.cost.flops for answer in answers),
        device_nanoseconds=sum(answer.cost.device_nanoseconds for answer in answers),
    )
    sources = tuple(source for answer in answers for source in answer.sources)
    return Answer(logits, sources, cost, answers[-1].budgets, first.fingerprint, first.description)
