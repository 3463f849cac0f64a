"""The teacher's answers on disk before they are used: what a run was told before it was killed is not asked again."""

import logging
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import torch
from blake3 import blake3
from torch import Tensor

from protos import teacher_pb2 as pb
from protos import wire
from student_worker.answer import SOURCES, Answer
from student_worker.errors import TeacherUnavailable
from student_worker.losses import TopK
from student_worker.unix import Teacher
from student_worker.weights import write_whole

_log = logging.getLogger(__name__)
_MAGIC = b"preceptor answers 1\n"
_FRAME = struct.Struct("<I16s")  # before each record: its bytes, and their BLAKE3-128
_PART = struct.Struct("<I")  # before each of a record's parts: its bytes
_DIGEST_BYTES = 16
_CODES = {name: code for code, name in SOURCES.items()}


class _Place(NamedTuple):
    start: int  # of the record, behind its frame
    size: int


class AnswerLog:
    """A teacher that writes each answer of `teacher` to the file `path` before it gives it, and gives what is there.

    To be asked by one Unix, in the place of its teacher. An answer is found by its request id if the very same samples
    are asked about, and is then asked of nobody. The file grows with each answer; `rotate` takes out what no checkpoint
    needs any more. A process may be killed at any time: a record that was being written is cut off when the file is
    opened again. (What a machine without power loses of the file's end is asked again under the same request id, so it
    costs nothing while the server keeps its record of that.) Thread-safe.

    Raises ValueError for a file that is no such log, or of another version, OSError where it cannot be written.
    """

    def __init__(self, teacher: Teacher, path: str | Path) -> None:
        self._teacher = teacher
        self._path = Path(path)
        self._lock = threading.Lock()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            write_whole(self._path, _MAGIC)
        self._file, self._places = _opened(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits for nobody; an answer that comes later is not kept, and raises TeacherUnavailable where it arrives."""
        with self._lock:
            self._file.close()

    def label(self, x: Tensor, *, request_id: str, cache_mode: Literal["use", "bypass"], candidates: int) -> Answer:
        """The teacher's answer to the samples x [n, ...], which it is asked about only if none is in the file."""
        asked = _digest(x)
        record = self._found(request_id, asked)
        if record is None:
            answer = self._teacher.label(x, request_id=request_id, cache_mode=cache_mode, candidates=candidates)
            record = _encoded(request_id, asked, answer)
            self._append(request_id, record)
        # New or old, it comes from what is written: the second time it cannot be another one.
        return _decoded(record)

    def rotate(self, unix: Mapping[str, Any]) -> None:
        """Forgets all answers but those to the queries that are pending in `unix`, what Unix.state_dict() gave.

        Call it when that state is safe in its place, not before: until then the one before it needs the others.
        """
        with self._lock:
            pending = [query["request_id"] for query in unix["pending"] if query["request_id"] in self._places]
            frames = [_framed(self._read(self._places[request_id])) for request_id in pending]
            write_whole(self._path, b"".join([_MAGIC, *frames]))
            self._file.close()
            self._file, self._places = _opened(self._path)

    def _found(self, request_id: str, asked: bytes) -> bytes | None:
        with self._lock:
            if self._file.closed or (place := self._places.get(request_id)) is None:
                return None
            record = self._read(place)
        if _parts(record)[1] == asked:
            return record
        _log.warning(
            "request %s asks about other samples than before the run was resumed, so it is asked anew: on this machine "
            "(device, threads, versions) the run is not bit for bit what it was",
            request_id,
        )
        return None

    def _read(self, place: _Place) -> bytes:
        self._file.seek(place.start)
        return self._file.read(place.size)

    def _append(self, request_id: str, record: bytes) -> None:
        with self._lock:
            if self._file.closed:
                raise TeacherUnavailable("this log of answers is closed")
            start = self._file.seek(0, os.SEEK_END) + _FRAME.size
            self._file.write(_framed(record))
            self._file.flush()  # with the operating system, a killed process loses nothing
            self._places[request_id] = _Place(start, len(record))


def _opened(path: Path) -> tuple[BinaryIO, dict[str, _Place]]:
    """The file, ready to be read and written, and where the record of each request id is. Cuts off a torn end."""
    with path.open("r+b") as file:
        if (found := file.read(len(_MAGIC))) != _MAGIC:
            raise ValueError(
                f"{path} begins with {found!r}, which is no log of answers that this program reads ({_MAGIC!r}); "
                "resume with the program that wrote it, or begin anew without that file"
            )
        places: dict[str, _Place] = {}
        end = file.tell()
        while len(frame := file.read(_FRAME.size)) == _FRAME.size:
            size, checksum = _FRAME.unpack(frame)
            record = file.read(size)
            if _checksum(record) != checksum:
                break
            places[_parts(record)[0].decode()] = _Place(end + _FRAME.size, size)
            end = file.tell()
        if (torn := file.seek(0, os.SEEK_END) - end) > 0:
            _log.warning("%s: its last %d bytes are no whole record, and are cut off", path, torn)
            file.truncate(end)
    return path.open("r+b"), places


def _framed(record: bytes) -> bytes:
    return _FRAME.pack(len(record), _checksum(record)) + record


def _checksum(content: bytes) -> bytes:
    return blake3(content).digest(length=_DIGEST_BYTES)


def _digest(x: Tensor) -> bytes:
    """Of the samples x [n, ...], with their shape and type."""
    content = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return blake3(f"{x.dtype}{tuple(x.shape)}".encode()).update(content).digest(length=_DIGEST_BYTES)


def _encoded(request_id: str, asked: bytes, answer: Answer) -> bytes:
    """A record: request id, digest of what was asked, LabelResponse, TeacherDescription."""
    logits = answer.logits
    if isinstance(logits, TopK):
        n, k = logits.values.shape
        answers = pb.Answers(
            encoding=pb.ENCODING_TOP_K,
            shape=[n, int(logits.indices.max()) + 1],  # of the classes beyond nothing is known here, or needed
            k=k,
            temperature=logits.temperature,
            values=_bytes(logits.values, torch.float32),
            indices=_bytes(logits.indices, torch.int32),
            tail_mass=_bytes(logits.tail_mass, torch.float32),
        )
    else:
        values = _bytes(logits, torch.float32)
        answers = pb.Answers(encoding=pb.ENCODING_FLOAT32, shape=logits.shape, values=values)
    reply = pb.LabelResponse(
        fingerprint=answer.fingerprint,
        answers=[answers],
        sources=[_CODES[source] for source in answer.sources],
        cost=answer.cost,
        budgets=answer.budgets,
    )
    parts = (request_id.encode(), asked, reply.SerializeToString(), answer.description.SerializeToString())
    return b"".join(_PART.pack(len(part)) + part for part in parts)


def _decoded(record: bytes) -> Answer:
    _, _, answered, described = _parts(record)
    reply, description = pb.LabelResponse.FromString(answered), pb.TeacherDescription.FromString(described)
    values = wire.decode_answers(reply.answers[0])
    logits: Tensor | TopK
    if isinstance(values, wire.TopK):
        top, indices, mass = map(torch.from_numpy, (values.values, values.indices, values.tail_mass))
        logits = TopK(top, indices.long(), mass, values.temperature)
    else:
        logits = torch.from_numpy(values)
    sources = tuple(SOURCES[source] for source in reply.sources)
    return Answer(logits, sources, reply.cost, tuple(reply.budgets), reply.fingerprint, description)


def _parts(record: bytes) -> list[bytes]:
    parts, start = [], 0
    while start < len(record):
        (size,) = _PART.unpack_from(record, start)
        start += _PART.size
        parts.append(record[start : start + size])
        start += size
    return parts


def _bytes(values: Tensor, dtype: torch.dtype) -> bytes:
    return values.detach().to("cpu", dtype).contiguous().numpy().tobytes()
