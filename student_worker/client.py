"""The student's end of the contract: synchronous, a window of queries in flight, several addresses, own exceptions."""

import math
import secrets
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from blake3 import blake3

from protos import teacher_pb2 as pb
from protos import wire
from protos.conformance import check_job_name
from protos.keys import KEY_BYTES, sample_keys
from protos.wire import Array
from student_worker.answer import Answer, Lookup, decoded, decoded_lookup, interleaved, looked_up
from student_worker.calls import Calls
from student_worker.errors import InvalidQuery, TeacherUnavailable
from student_worker.samples import Samples, count, named_arrays
from student_worker.threads import DaemonPool
from student_worker.tls import Tls
from student_worker.whole import Whole

CacheMode = Literal["use", "read_only", "bypass"]
Encoding = Literal["float32", "float16", "top_k"]

_BATCHES_A_PART = 4  # enough to keep a device busy, few enough that each part finishes well in time
_KEYS_A_LOOKUP = 1000
_MESSAGE_OVERHEAD = 64 * 1024  # names, shapes and the reply's own fields, generously
_DIGEST_BYTES = 8
_ENCODINGS = {"float32": pb.ENCODING_FLOAT32, "float16": pb.ENCODING_FLOAT16, "top_k": pb.ENCODING_TOP_K}
_CACHE_MODES = {
    "use": pb.CACHE_MODE_USE,
    "read_only": pb.CACHE_MODE_READ_ONLY,
    "bypass": pb.CACHE_MODE_BYPASS,
}


@dataclass(frozen=True)
class _How:
    """What the caller of a query says beside its samples."""

    request_id: str
    cache_mode: CacheMode
    look_up_first: bool


class TeacherClient:
    """A teacher at one address or several ("a:8001,b:8001"), asked on behalf of one job.

    A query is sent in parts of a few of the server's batches, each charged, or refused, by itself. At most `window`
    parts are in flight, and each call has `timeout` seconds, retries included. Replicas that the servers know of are
    found by themselves, so one address is enough; each part goes to the one with the fewest samples in flight.
    UNAVAILABLE, a full queue and others' reserved budget are retried: at the next replica where there is one, else with
    jittered backoff and not before the server's own hint. A replica that answers nothing for five times its own p99,
    and at least 2 s, is left while another is there: what is in flight at it is asked elsewhere under the same request
    ids. `fingerprint`, or else the first answer, pins the teacher: replicas of another one are not asked, and where
    only such are left FingerprintChanged is raised.
    `encoding="top_k"` asks for the `k` largest logits and the tail's mass at `temperature`, which must then be the
    loss's. Answers are cached, and found, under `cache_namespace`; empty is the cache that the server shares. With
    `tls` the server must show a certificate signed by a CA of this machine, or of `ca_file`; `certificate_file` and
    `key_file` are for a server that asks for one (PEM; any of them implies `tls`). Thread-safe. What goes wrong with a
    call is a student_worker.errors.TeacherError; an argument out of its range is a ValueError.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        job: str = "default",
        token: str | None = None,
        tls: bool = False,
        ca_file: str | Path | None = None,
        certificate_file: str | Path | None = None,
        key_file: str | Path | None = None,
        teacher: str = "",
        encoding: Encoding = "float32",
        k: int = 0,
        temperature: float = 1.0,
        cache_namespace: str = "",
        fingerprint: str = "",
        window: int = 8,
        timeout: float = 60.0,
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be positive, got {window}")
        if encoding not in _ENCODINGS:
            raise ValueError(f"encoding is {encoding!r}: choose one of {', '.join(_ENCODINGS)}")
        if k < 0 or (encoding == "top_k") != (k > 0) or not 0 < temperature < math.inf:
            raise ValueError(
                f"encoding {encoding!r} with k {k} and temperature {temperature}: top_k takes a k of at least 1 and a "
                "finite temperature above 0, the others neither"
            )
        if cache_namespace:
            try:
                check_job_name(cache_namespace)
            except wire.MalformedMessage:
                raise ValueError(
                    f"cache_namespace: {cache_namespace[:128]!r}; a name is 1 to 128 letters, digits or . _ : / + -, "
                    "as a job's"
                ) from None
        self.job = job
        self._teacher = teacher
        self._spec = pb.OutputSpec(name="logits", encoding=_ENCODINGS[encoding], k=k, temperature=temperature)
        self._namespace = cache_namespace
        self._fingerprint = fingerprint
        files = [None if file is None else Path(file) for file in (ca_file, certificate_file, key_file)]
        trust = Tls(*files) if tls or any(files) else None
        self.addresses = address.split(",") if isinstance(address, str) else list(address)
        self._call = Calls(address, job=job, token=token, timeout=timeout, tls=trust)
        self._lock = threading.Lock()
        self._description: pb.TeacherDescription | None = None
        self._window = threading.BoundedSemaphore(window)
        self._pool = DaemonPool(window, "teacher-client")
        # Also runs when a program ends without close(), so that calls in flight end before the interpreter does.
        self._close = weakref.finalize(self, _close, self._call, self._pool)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is in flight; waiting callers get TeacherUnavailable."""
        self._close()

    def describe(self) -> pb.TeacherDescription:
        """The teacher's description, fetched once: who answers, what it takes, what it gives, what it costs."""
        with self._lock:
            if self._description is None:
                self._description = self._call.describe(self._teacher, self._fingerprint)
            return self._description

    @property
    def tenant(self) -> str:
        """Whose job this is, as the server knows it by the token; "" from a server older than this field."""
        self.describe()
        return self._call.tenant

    def lookup(self, x: Samples) -> Lookup:
        """Which of the n samples' answers are cached, with the answers; the samples themselves are not sent.

        Nothing is computed and nothing is charged. Raises NotServed where the server keeps no cache.
        """
        description = self.describe()
        keys = sample_keys(description.fingerprint, named_arrays(x, description))
        most = self._fitting(KEY_BYTES, _KEYS_A_LOOKUP, description)
        return looked_up(
            [self._looked_up(keys[start : start + most], description) for start in range(0, len(keys), most)]
        )

    def label(
        self,
        x: Samples,
        *,
        request_id: str = "",
        cache_mode: CacheMode = "use",
        look_up_first: bool = False,
        candidates: int = 0,
    ) -> Answer:
        """The answers to the n samples `x` [n, ...] (or a mapping of named inputs), in their order.

        Values travel as they are: uint8 is raw pixels, floats are normalised as `describe()` says. The same
        `request_id` with the same samples is charged once. `look_up_first` sends keys before samples, and then only
        those samples whose answers are not cached: worth its round trip where many are, and samples are large.
        `candidates`: of how many samples these were chosen (0: all of them are here); the ledger tells by it what
        selection saves.
        """
        return self.submit(
            x, request_id=request_id, cache_mode=cache_mode, look_up_first=look_up_first, candidates=candidates
        ).result()

    def submit(
        self,
        x: Samples,
        *,
        request_id: str = "",
        cache_mode: CacheMode = "use",
        look_up_first: bool = False,
        candidates: int = 0,
    ) -> "Future[Answer]":
        """Like `label`, without waiting for the answer; blocks while `window` parts are in flight.

        Once a part has failed, or the future was cancelled, no further part is sent. Callbacks of the future run in one
        of `window` threads that also ask: they must not wait for another answer.
        """
        if cache_mode not in _CACHE_MODES:
            raise ValueError(f"cache_mode is {cache_mode!r}: choose one of {', '.join(_CACHE_MODES)}")
        if look_up_first and cache_mode == "bypass":
            raise ValueError(
                "look_up_first with cache_mode 'bypass' reads the cache and does not: give up one of the two"
            )
        how = _How(request_id, cache_mode, look_up_first)
        description = self.describe()
        inputs = named_arrays(x, description)
        n = count(inputs)
        if candidates and candidates < n:
            raise ValueError(f"candidates is {candidates}, of which {n} are asked about: give n or more, or 0")
        unasked = max(0, candidates - n)
        bounds = list(pairwise([*range(0, n, self._part_size(inputs, description)), n]))
        whole = Whole(len(bounds))
        for number, (start, stop) in enumerate(bounds):
            self._window.acquire()
            if whole.future.done() or self._call.closed.is_set():
                self._window.release()
                whole.fail(TeacherUnavailable("this client is closed"))
                break
            # A copy: the caller may write into his own meanwhile.
            samples = {name: np.array(array[start:stop]) for name, array in inputs.items()}
            left_out = unasked * stop // n - unasked * start // n  # the parts' sum is the whole
            part = self._pool.submit(partial(self._answered, samples, left_out, how, description, whole))
            part.add_done_callback(lambda _: self._window.release())
            whole.add(number, part)
        return whole.future

    def spend(
        self, job: str | None = None, *, since: datetime | None = None, until: datetime | None = None
    ) -> pb.SpendResponse:
        """What the ledger says of a job: None is this client's own, "" all those of its tenant; no other's are told.

        One line a UTC day, fingerprint and price: samples asked, computed, cached and coalesced, FLOPs, device time,
        money. `since` and `until` leave out the days before and after theirs (UTC where they are naive). Every answer
        that the server asked has given is in it; those of other replicas follow when they post them, within seconds.
        `budgets` are those that the job draws on. Raises InvalidQuery for a job that cannot be a name.
        """
        request = pb.SpendRequest(job=self.job if job is None else job)
        for field, moment in ((request.since, since), (request.until, until)):
            if moment is not None:
                field.FromDatetime(moment)
        reply: pb.SpendResponse = self._call("Spend", request)
        return reply

    def _part_size(self, inputs: dict[str, Array], description: pb.TeacherDescription) -> int:
        """How many samples to send at once: a few batches, and no more than one lookup may have keys."""
        sent = sum(array.nbytes for array in inputs.values()) // count(inputs)
        return self._fitting(
            sent, min(_BATCHES_A_PART * description.limits.max_batch_size, _KEYS_A_LOOKUP), description
        )

    def _fitting(self, sent: int, most: int, description: pb.TeacherDescription) -> int:
        """At most so many of `sent` bytes each, as fit a request and their answers a reply."""
        limits = description.limits
        (classes,) = description.outputs[0].shape
        received = wire.answers_bytes(self._spec, 2, classes) - wire.answers_bytes(self._spec, 1, classes)
        fitting = (limits.max_message_bytes - _MESSAGE_OVERHEAD) // max(sent, received)
        if fitting < 1:
            raise InvalidQuery(
                f"inputs: one sample takes {max(sent, received)} bytes, more than the server's limit of "
                f"{limits.max_message_bytes} for a message; raise its --max-message-bytes"
            )
        return min(most, fitting, limits.max_samples_per_query)

    def _answered(
        self, samples: dict[str, Array], unasked: int, how: _How, description: pb.TeacherDescription, whole: Whole
    ) -> Answer:
        """The answer to one part of a query, in a thread of the pool: it waits for calls, never for another part."""
        if not (how.request_id or how.look_up_first):
            return self._labelled(samples, unasked, "", how, description)
        keys = sample_keys(description.fingerprint, samples)
        if not how.look_up_first:
            return self._labelled(samples, unasked, self._part_id(how, keys), how, description)
        known = self._looked_up(keys, description, unasked)  # who may have nothing left to ask tells it here
        missing = (~known.found).nonzero()[:, 0].tolist()
        if not missing and known.answer is not None:
            return known.answer
        if whole.future.done():
            raise TeacherUnavailable("nobody waits for this query any more")
        misses = {name: array[missing] for name, array in samples.items()}
        part_id = self._part_id(how, [keys[place] for place in missing])
        asked = self._labelled(misses, 0, part_id, how, description)
        return asked if known.answer is None else interleaved(known.found, known.answer, asked)

    def _part_id(self, how: _How, keys: Sequence[bytes]) -> str:
        """Says what is asked, and nothing else: an id stands for one content, and a replayed query's parts may differ.

        After a replay other samples are cached, and another device's students mix other samples.
        """
        if not how.request_id:
            return ""
        asked = b"".join(keys) + self._spec.SerializeToString(deterministic=True)
        return f"{how.request_id}/{blake3(asked).hexdigest(length=_DIGEST_BYTES)}"

    def _labelled(
        self, samples: dict[str, Array], unasked: int, part_id: str, how: _How, description: pb.TeacherDescription
    ) -> Answer:
        request = pb.LabelRequest(
            teacher=self._teacher,
            inputs=[wire.encode_tensor(name, array) for name, array in samples.items()],
            outputs=[self._spec],
            # A query that is moved from one replica to another is charged once if it has an id.
            request_id=part_id or (f"-/{secrets.token_hex(_DIGEST_BYTES)}" if self._call.moves else ""),
            expected_fingerprint=description.fingerprint,
            cache_mode=_CACHE_MODES[how.cache_mode],
            cache_namespace=self._namespace,
            candidates=unasked and unasked + count(samples),
        )
        return decoded(self._call("Label", request, count(samples)), count(samples), description, self._spec)

    def _looked_up(self, keys: Sequence[bytes], description: pb.TeacherDescription, unasked: int = 0) -> Lookup:
        request = pb.LookupRequest(
            teacher=self._teacher,
            keys=keys,
            outputs=[self._spec],
            expected_fingerprint=description.fingerprint,
            cache_namespace=self._namespace,
            candidates=unasked and unasked + len(keys),
        )
        return decoded_lookup(self._call("Lookup", request), len(keys), description, self._spec)


def _close(calls: Calls, pool: DaemonPool) -> None:
    calls.close()
    pool.close()
