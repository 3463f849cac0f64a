"""UNIX, the step: score, select, mix, ask, learn (Xu, Liu, Loy, arXiv 2012.09413; docs/unix.md, "One step")."""

import math
import secrets
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from protos import teacher_pb2 as pb
from student_worker.answer import Answer
from student_worker.errors import InvalidQuery
from student_worker.losses import TopK, distillation_loss
from student_worker.selection import Mixing, Recipe, ScoreMode, Selection, Transform
from student_worker.threads import DaemonPool
from student_worker.uncertainty import Strategy, as_ratio
from student_worker.understanding import Understanding

_NEARLY_CLEAN = 0.1  # with up to this share of its partner, a sample still is what its label says
_VERSION = 1


class Teacher(Protocol):
    """All that Unix wants of a teacher; a TeacherClient is one. Blocks, and is called from several threads at once."""

    def label(self, x: Tensor, *, request_id: str, cache_mode: Literal["use", "bypass"], candidates: int) -> Answer: ...


class Observer(Protocol):
    """Who is told what a Unix does, on the thread of its loop; metrics.Metrics is one."""

    def selected(self, uncertainty: Tensor, kept: Tensor) -> None:
        """A batch was selected from: how unsure the student is of each sample, [n], 0..1, and which are asked about,
        [k] positions. Both on the CPU."""

    def answered(self, sources: tuple[str, ...], seconds: float) -> None:
        """An answer is here, and was waited for so long."""


@dataclass(frozen=True, eq=False)
class Distilled:
    """k samples to learn from, all on the device of x; in rank order, or in batch order where nothing is mixed."""

    x: Tensor
    """[k, ...], as the student takes it."""
    answer: Tensor | TopK
    """The teacher's logits [k, c], or the largest of them."""
    share: Tensor
    """[k], the partner's share of each sample."""
    y: Tensor | None
    """[k, ...] own labels, if the loader gave any."""
    y_partner: Tensor | None
    """[k, ...] the partners' labels."""
    index: Tensor | None
    """[k] own index in the data set, if the loader gave it."""
    source: tuple[str, ...]
    """Where each answer came from: `computed`, `cached` or `coalesced`."""
    lag: int
    """Optimiser steps between selection and use."""
    budgets: tuple[pb.Budget, ...] = ()
    """Those that the query drew on, after it."""


Criterion = Callable[[Tensor, Distilled], Tensor]


@dataclass(frozen=True)
class _Query:
    request_id: str
    step: int  # steps taken when it was selected
    recipe: Recipe
    x: Tensor  # [k, ...], as the student takes it
    y: Tensor | None  # [n, ...], as index: of the whole batch
    index: Tensor | None
    logits: Tensor | None  # [n, c], the student's own, of the scoring pass
    answer: Callable[[], Answer]  # blocks until the teacher has answered


class Unix:
    """Distils from `teacher`, asking only about what the student is unsure of.

    `keep` and `clean` are shares of the batch in hand, rounded half up to counts (at least 1): how many samples are
    asked about, and the rank from which a sample is more filler than itself; `sharpness` is how abruptly. `temperature`
    is the loss's. `strategy` is how samples are scored ("random" runs no student); `score_mode` is the student's mode
    meanwhile: "train" as it trains (batch-norm statistics move, as in the paper), "eval" without a trace.
    `mixing`: "adaptive" is the paper's, "none" keeps samples as they are, in batch order (their answers may be cached),
    "uniform" gives every rank the share lam. `criterion(student_logits, distilled)` -> Tensor[k] replaces the loss.
    The mixed, quantised batch passes through `to_teacher` on its way there and through `to_student` on its way to the
    student; neither may work in place. `generator` (CPU) draws scores, lam and partners; the default follows torch's
    initial seed and takes nothing from torch's own stream.

    Counts samples in `scored`, `asked`, `learnt`, and batches handed out in `steps`; an `observer` may be set and is
    told more. Nothing here is thread-safe.
    Raises ValueError for an argument out of its range.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        keep: float = 0.75,
        clean: float = 0.5,
        sharpness: float = 10.0,
        temperature: float = 4.0,
        strategy: Strategy = "entropy",
        mixing: Mixing = "adaptive",
        score_mode: ScoreMode = "train",
        criterion: Criterion | None = None,
        to_teacher: Transform | None = None,
        to_student: Transform | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}: give a finite number above 0 (published: 4)")
        self._selection = Selection(
            keep=keep,
            clean=clean,
            sharpness=sharpness,
            strategy=strategy,
            mixing=mixing,
            score_mode=score_mode,
            generator=generator,
        )
        self.strategy, self.mixing = strategy, mixing
        self.observer: Observer | None = None
        self._teacher = teacher
        self._temperature = temperature
        self._cache_mode: Literal["use", "bypass"] = "use" if mixing == "none" else "bypass"
        self._criterion = criterion or self._distillation
        self._to_teacher = to_teacher or _unchanged
        self._to_student = to_student or _unchanged

        self.scored = self.asked = self.learnt = self.steps = 0
        self._run = secrets.token_hex(8)
        self._selected = 0  # numbers the request ids; unlike steps it counts the abandoned batches too
        self._pending: deque[_Query] = deque()
        self._replays: deque[tuple[str, int, Recipe]] = deque()
        self._classes: int | None = None  # the teacher's, once it has answered
        self._understanding: Understanding | None = None
        self._understood = False

    def batches(self, loader: Iterable[Any], student: nn.Module, depth: int = 1) -> Generator[Distilled, None, None]:
        """What to learn from, for each batch of `loader`: x [n, ...], (x, y) or (x, y, index); y = -1 is no label.

        `depth` queries are in flight, in threads, while the student learns; scoring runs on the caller's thread, so a
        batch is selected by the student of `depth` steps before (0: by the student as it is, nothing is in flight).
        An error of the teacher is raised where its batch would be yielded. Closing the generator (contextlib.closing)
        abandons what is pending and waits for nobody: a call in flight ends with the teacher's answer, or its close().
        """
        if depth < 0:
            raise ValueError(f"depth is {depth}: it counts queries in flight, so give 0 or more")
        return self._batches(loader, student, depth)

    def _batches(self, loader: Iterable[Any], student: nn.Module, depth: int) -> Generator[Distilled, None, None]:
        self._refuse_while_pending()
        source = iter(loader)
        pool = DaemonPool(depth, "unix") if depth else None
        try:
            while True:
                while len(self._pending) <= depth and (batch := next(source, None)) is not None:
                    self._pending.append(self._ask(batch, student, pool))
                if not self._pending:
                    return
                yield self._receive(self._pending.popleft())
        finally:
            self._pending.clear()
            if pool is not None:
                pool.close()

    def criterion(self, student_logits: Tensor, b: Distilled) -> Tensor:
        """The loss, a scalar: the mean over the k samples. `student_logits` is [k, c].

        Raises InvalidQuery where the teacher knows another number of classes than the student.
        """
        self._check_classes(student_logits)
        losses = self._criterion(student_logits, b)
        if losses.shape != (len(b.x),):
            raise ValueError(f"criterion gave shape {tuple(losses.shape)}: give one loss a sample, [{len(b.x)}]")
        return losses.mean()

    def loss(self, student: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
        """One exact step on a batch x [n, ...]: score, select, mix, ask, learn. A scalar, to call backward() on."""
        b = self._receive(self._ask((x, y), student, None))
        return self.criterion(student(b.x), b)

    def state_dict(self) -> dict[str, Any]:
        """Random state, counters and pending batches (recipe and request id, no pixels), in plain values and tensors.

        Taken in the body of a loop over `batches`, it counts the batch in hand as learnt.
        """
        pending = [(query.request_id, query.step, query.recipe) for query in self._pending]
        return {
            "version": _VERSION,
            "run": self._run,
            "generator": self._selection.generator.get_state(),
            "selected": self._selected,
            "scored": self.scored,
            "asked": self.asked,
            "learnt": self.learnt,
            "steps": self.steps,
            "understood": self._understood,
            "pending": [
                {"request_id": request_id, "step": step, **recipe._asdict()}
                for request_id, step, recipe in [*pending, *self._replays]
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`, with a loader positioned after the `steps` batches that were learnt.

        The first batches drawn from it are those that were pending: they are not scored anew, but mixed and asked about
        as before, under the same request ids. Raises ValueError for a state of another version or with other keys.
        """
        self._refuse_while_pending()
        if state.get("version") != _VERSION:
            raise ValueError(f"the state has version {state.get('version')!r}, this program reads version {_VERSION}")
        if differing := state.keys() ^ self.state_dict().keys():
            raise ValueError(
                f"the state lacks keys or has unknown ones, {sorted(differing)}: give what state_dict() gave"
            )
        expected = {"request_id", "step", *Recipe._fields}
        if any(entry.keys() != expected for entry in state["pending"]):
            raise ValueError(f"a pending batch of the state has other keys than {sorted(expected)}")
        self._selection.generator.set_state(state["generator"].cpu())
        self._run, self._selected = state["run"], state["selected"]
        self.scored, self.asked = state["scored"], state["asked"]
        self.learnt, self.steps = state["learnt"], state["steps"]
        self._understanding, self._understood = None, state["understood"]
        self._replays = deque(
            (entry["request_id"], entry["step"], Recipe(*(entry[field] for field in Recipe._fields)))
            for entry in state["pending"]
        )

    def _ask(self, batch: Any, student: nn.Module, pool: DaemonPool | None) -> _Query:
        x, y, index = _unpacked(batch)
        logits = None
        if self._replays:
            request_id, step, recipe = self._replays.popleft()
            if recipe.n != len(x):
                raise ValueError(
                    f"the loader gives {len(x)} samples where {recipe.n} were pending: after load_state_dict, "
                    f"position it behind the {self.steps} batches that were learnt"
                )
            mixed = self._selection.again(x, recipe)
        else:
            recipe, mixed, logits, scores = self._selection.select(student, x, self._to_student)
            request_id, step = f"{self._run}/{self._selected}", self.steps
            self._selected += 1
            self.scored += 0 if logits is None else len(x)
            self.asked += len(mixed)
            if self.observer is not None:  # a GPU is not waited for: the recipe is here, so the scores are computed
                classes = 0 if logits is None else logits.shape[1]
                self.observer.selected(as_ratio(scores.cpu(), self.strategy, classes), recipe.kept)
        sent = self._to_teacher(mixed)
        ask = partial(self._teacher.label, sent, request_id=request_id, cache_mode=self._cache_mode, candidates=len(x))
        answer = ask if pool is None else pool.submit(ask).result
        return _Query(request_id, step, recipe, self._to_student(mixed), y, index, logits, answer)

    def _receive(self, query: _Query) -> Distilled:
        """Waits for the answer; from here on the batch counts as learnt."""
        began = perf_counter()
        answer, recipe = query.answer(), query.recipe
        if self.observer is not None:
            self.observer.answered(answer.sources, perf_counter() - began)
        self._check(answer, query)
        self._understand(answer, query)
        lag = self.steps - query.step
        self.learnt += len(recipe.kept)
        self.steps += 1
        device = query.x.device
        return Distilled(
            x=query.x,
            answer=answer.logits.to(device),
            share=recipe.share.to(device),
            y=_taken(query.y, recipe.kept, device),
            y_partner=_taken(query.y, recipe.partner, device),
            index=_taken(query.index, recipe.kept, device),
            source=answer.sources,
            lag=lag,
            budgets=answer.budgets,
        )

    def _check(self, answer: Answer, query: _Query) -> None:
        if isinstance(answer.logits, TopK):
            outputs = answer.description.outputs
            self._classes = outputs[0].shape[-1] if outputs and outputs[0].shape else None
            answered = len(answer.logits.values)
        else:
            answered, self._classes = answer.logits.shape
        if answered != (k := len(query.recipe.kept)):
            raise InvalidQuery(f"the teacher gave {answered} answers to {k} samples: it must give one row a sample")
        if query.logits is not None:
            self._check_classes(query.logits)

    def _check_classes(self, student_logits: Tensor) -> None:
        if self._classes is not None and student_logits.shape[-1] != self._classes:
            raise InvalidQuery(
                f"the teacher answers for {self._classes} classes, the student for {student_logits.shape[-1]}: "
                "build the student for the teacher's classes, or ask another teacher"
            )

    def _understand(self, answer: Answer, query: _Query) -> None:
        """The teacher's top-1 on nearly clean samples comes for free: no query is made for it."""
        y, recipe = query.y, query.recipe
        if self._understood or self._classes is None or y is None or y.dim() != 1 or y.is_floating_point():
            return
        if self._understanding is None:
            output = next(iter(answer.description.outputs), None)
            declared, names = (output.top1, output.class_names) if output is not None else (0.0, ())
            self._understanding = Understanding(self._classes, declared=declared, class_names=names)
        logits = answer.logits
        predicted = (logits.indices[:, 0] if isinstance(logits, TopK) else logits.argmax(1)).cpu()
        own = None if query.logits is None else query.logits.argmax(1).cpu()
        own_places, other_places = recipe.share <= _NEARLY_CLEAN, recipe.share >= 1 - _NEARLY_CLEAN
        for clean, place in ((own_places, recipe.kept[own_places]), (other_places, recipe.partner[other_places])):
            self._understanding.observe(predicted[clean], y.cpu()[place], None if own is None else own[place])
        self._understanding.verify()
        self._understood = self._understanding.done

    def _distillation(self, student_logits: Tensor, b: Distilled) -> Tensor:
        return distillation_loss(student_logits, b.answer, self._temperature, reduction="none")

    def _refuse_while_pending(self) -> None:
        if self._pending:
            raise RuntimeError("batches() is still running on this Unix: exhaust or close that generator first")


def _unpacked(batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, y and index of what a loader gives."""
    parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    x, y, index = (None if part is None else torch.as_tensor(part) for part in (*parts, None, None)[:3])
    if len(parts) > 3 or x is None or x.dim() == 0 or len(x) == 0:
        raise ValueError("a batch is x, (x, y) or (x, y, index), with at least one sample in x [n, ...]")
    for name, part in (("y", y), ("index", index)):
        if part is not None and part.shape[:1] != x.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(part.shape)}: give one for each of the {len(x)} samples of x")
    return x, y, index


def _taken(values: Tensor | None, places: Tensor, device: torch.device) -> Tensor | None:
    return None if values is None else values[places.to(values.device)].to(device)


def _unchanged(x: Tensor) -> Tensor:
    return x
