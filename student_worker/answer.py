"""What a teacher says of a query, decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from protos import teacher_pb2 as pb
from protos import wire
from student_worker.errors import FingerprintChanged, TeacherFailed
from student_worker.losses import TopK

SOURCES = {pb.SOURCE_COMPUTED: "computed", pb.SOURCE_CACHED: "cached", pb.SOURCE_COALESCED: "coalesced"}


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


@dataclass(frozen=True)
class Lookup:
    """Which of n samples have a cached answer, with the answers."""

    found: Tensor
    """bool [n]."""
    answer: Answer | None = field(repr=False)
    """Of the samples found, in their order; None where none is."""


def decoded(reply: pb.LabelResponse, n: int, description: pb.TeacherDescription, spec: pb.OutputSpec) -> Answer:
    """The answer to n samples, asked as `spec` says of the teacher that `description` describes.

    Raises FingerprintChanged where another teacher answered, TeacherFailed where the reply contradicts itself.
    """
    _check_fingerprint(reply.fingerprint, description)
    logits = _logits(reply.answers, n, description, spec)
    if unknown := set(reply.sources) - SOURCES.keys():
        raise TeacherFailed(f"the server's reply has sources {unknown}, which are not known here")
    if len(reply.sources) != n:
        raise TeacherFailed(f"the server's reply has {len(reply.sources)} sources, asked were {n} samples")
    sources = tuple(SOURCES[source] for source in reply.sources)
    return Answer(logits, sources, reply.cost, tuple(reply.budgets), reply.fingerprint, description)


def decoded_lookup(reply: pb.LookupResponse, n: int, description: pb.TeacherDescription, spec: pb.OutputSpec) -> Lookup:
    """What is known of n keys; arguments and errors as those of `decoded`."""
    _check_fingerprint(reply.fingerprint, description)
    if len(reply.found) != n:
        raise TeacherFailed(f"the server's reply is of {len(reply.found)} keys looked up, asked were {n}")
    found = torch.tensor(list(reply.found), dtype=torch.bool)
    if hits := int(found.sum()):
        logits = _logits(reply.answers, hits, description, spec)
        cached = Answer(logits, ("cached",) * hits, fingerprint=reply.fingerprint, description=description)
        return Lookup(found, cached)
    if reply.answers:
        raise TeacherFailed("the server's reply has answers, but says that none was found")
    return Lookup(found, None)


def concatenated(answers: Sequence[Answer]) -> Answer:
    """The answers to a query's parts as one, in their order. Only the parts that were labelled have a cost."""
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
        currency=next((answer.cost.currency for answer in answers if answer.cost.currency), ""),
        flops=sum(answer.cost.flops for answer in answers),
        device_nanoseconds=sum(answer.cost.device_nanoseconds for answer in answers),
    )
    sources = tuple(source for answer in answers for source in answer.sources)
    budgets = next((answer.budgets for answer in reversed(answers) if answer.budgets), ())
    return Answer(logits, sources, cost, budgets, first.fingerprint, first.description)


def looked_up(parts: Sequence[Lookup]) -> Lookup:
    """The lookups of parts as one, in their order."""
    answers = [part.answer for part in parts if part.answer is not None]
    return Lookup(torch.cat([part.found for part in parts]), concatenated(answers) if answers else None)


def interleaved(found: Tensor, known: Answer, asked: Answer) -> Answer:
    """The answer to n samples, in their order: `known` are those `found` (bool [n]), `asked` the others."""
    both = concatenated([known, asked])
    order = torch.cat([found.nonzero(), (~found).nonzero()])[:, 0].argsort()  # [n], where each sample's answer stands
    logits = both.logits
    if isinstance(logits, TopK):
        logits = TopK(logits.values[order], logits.indices[order], logits.tail_mass[order], logits.temperature)
    else:
        logits = logits[order]
    return replace(both, logits=logits, sources=tuple(both.sources[place] for place in order.tolist()))


def _check_fingerprint(given: str, description: pb.TeacherDescription) -> None:
    if given != description.fingerprint:
        raise FingerprintChanged(f"fingerprint: asked {description.fingerprint}, answered by {given}; begin a new run")


def _logits(
    answers: Sequence[pb.Answers], n: int, description: pb.TeacherDescription, spec: pb.OutputSpec
) -> Tensor | TopK:
    try:
        values = wire.decode_answers(answers[0])
    except (wire.MalformedMessage, IndexError) as error:
        raise TeacherFailed(f"the server's reply cannot be read: {error}") from error
    asked, given = (
        (spec.encoding, [n, *description.outputs[0].shape]),
        (answers[0].encoding, [*answers[0].shape]),
    )
    if asked != given:
        raise TeacherFailed(f"the server's reply has encoding and shape {given}, asked were {asked}")
    if not isinstance(values, wire.TopK):
        return torch.from_numpy(values)
    if (answers[0].k, values.temperature) != (spec.k, spec.temperature):
        raise TeacherFailed(
            f"the server's reply has k {answers[0].k} and temperature {values.temperature:g}, asked were {spec.k} and "
            f"{spec.temperature:g}"
        )
    top, indices, mass = map(torch.from_numpy, (values.values, values.indices, values.tail_mass))
    return TopK(top, indices.long(), mass, values.temperature)
