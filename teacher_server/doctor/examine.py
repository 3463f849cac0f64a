"""All checks, in the order in which they are worth reading."""

from collections.abc import Iterator
from typing import TextIO

from teacher_server.config import ServeSettings
from teacher_server.doctor import machine
from teacher_server.doctor.findings import Finding, tell


def examine(settings: ServeSettings, output: TextIO) -> int:
    """Prints what is found; the exit status, 1 where there is a problem."""
    return tell(_findings(settings), output)


def _findings(settings: ServeSettings) -> Iterator[Finding]:
    incomplete = False
    for finding in machine.software(settings):
        incomplete |= finding.level == "problem"
        yield finding
    if incomplete:  # what comes next needs it
        return
    from teacher_server.doctor import certificates, network, stores, teacher  # noqa: PLC0415

    yield from machine.device(settings)
    served, findings = teacher.loaded(settings)
    yield from findings
    weights_bytes = 0
    if served is not None:
        tensors = served.module.state_dict().values()
        weights_bytes = sum(tensor.nbytes for tensor in tensors)
        yield from teacher.description(served.description)
        yield from teacher.batch(settings, served)
        yield from teacher.limits(settings, served.description)
    yield from network.ports(settings)
    yield from network.reach(settings)
    yield from network.replicas(settings)
    yield from network.tokens(settings)
    yield from certificates.certificates(settings)
    yield from network.collector(settings)
    yield from stores.checked(settings)
    yield from machine.memory(settings, weights_bytes)
    yield from machine.descriptors(settings)
