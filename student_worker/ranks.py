"""Several processes that train one student between them: who is who, what each learns from, one gradient of all.

It knows torch.distributed and no cluster. Who starts the processes, and starts them again, is none of its business.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from student_worker.unix import Distilled

# Ranks wait here for a teacher that answers one of them late, and for rank 0 while it evaluates. A rank that dies is
# noticed at once, for its connections close; so this is only how long one that hangs goes unnoticed.
_PATIENCE = timedelta(hours=24)


class Ranks:
    """One rank: a run of one process. `Group` is for several, and this says what each method is for."""

    rank = 0
    world = 1

    def wrap(self, student: nn.Module) -> nn.Module:
        """The student as the loop calls it to learn: backward() then gives the mean gradient over all ranks.

        Scoring calls the student itself, for nothing of it is to be exchanged.
        """
        return student

    def in_step(self, batches: Iterable[Distilled]) -> Generator[tuple[Distilled, float], None, None]:
        """Each batch of this rank once all ranks have theirs, and the weight of its mean loss.

        With these weights the mean over the ranks is the mean over all samples learnt from in this step. What one
        rank's `batches` raises, all ranks raise at the same step, so that none is left waiting.
        """
        for batch in batches:
            yield batch, 1.0

    def sums(self, *values: float) -> tuple[float, ...]:
        """Each value summed over the ranks; waits until all ranks are here."""
        return values

    def wait(self) -> None:
        """Until all ranks are here."""

    def seed(self, seed: int) -> int:
        """A seed of this rank's own; rank 0 has the run's, so that one rank is the run of one process."""
        return seed

    def all_raise(self, error: Exception) -> bool:  # noqa: ARG002
        """Do all ranks end with this error, at the same step? Else the others may be waiting for this one."""
        return True


ALONE = Ranks()


class Group(Ranks):
    """The ranks of torch.distributed's default process group, one process each. Use `joined()`."""

    def __init__(self, words: dist.ProcessGroup) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self._words = words
        self._raised: Exception | None = None

    def wrap(self, student: nn.Module) -> nn.Module:
        # Buffers stay each rank's own. Broadcast at each step, rank 0's batch-norm statistics would overwrite what the
        # others counted while they scored; so rank 0's are those that are evaluated and kept.
        device = next(student.parameters()).device
        return DistributedDataParallel(
            student, device_ids=[device] if device.type == "cuda" else None, forward_sync_buffers=False
        )

    def in_step(self, batches: Iterable[Distilled]) -> Generator[tuple[Distilled, float], None, None]:
        source = iter(batches)
        while True:
            batch, error = None, None
            try:
                batch = next(source, None)
            except Exception as raised:  # noqa: BLE001 - raised again, on every rank
                error = raised
            samples = 0 if batch is None else learnt(batch)
            total, failed, ended = self.sums(samples, error is not None, batch is None and error is None)
            if failed:
                self._raised = self._first(error)
                raise self._raised
            if batch is None or ended:
                if ended < self.world:
                    raise RuntimeError(f"{ended:.0f} of {self.world} ranks have no batch at this step, the others do")
                return
            yield batch, samples * self.world / total

    def sums(self, *values: float) -> tuple[float, ...]:
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self._words)
        return tuple(sums.tolist())

    def wait(self) -> None:
        self.sums(0.0)

    def all_raise(self, error: Exception) -> bool:
        return error is self._raised

    def seed(self, seed: int) -> int:
        return seed if self.rank == 0 else int(np.random.SeedSequence([seed, self.rank]).generate_state(1)[0])

    def _first(self, own: Exception | None) -> Exception:
        """The error of the lowest rank that has one: the same on every rank."""
        errors: list[Exception | None] = [None] * self.world
        dist.all_gather_object(errors, own, group=self._words)
        rank, error = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        error.add_note(f"rank {rank} of {self.world}")
        return error


@contextmanager
def joined() -> Generator[Ranks, None, None]:
    """The ranks of the default process group, which somebody has made; ALONE where there is none.

    What the ranks tell each other travels over gloo, on the CPU, whatever carries the gradients: so nothing waits for
    a device, and NCCL's watchdog never sees a rank wait for its teacher.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield ALONE
        return
    words = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Group(words)
    finally:
        dist.destroy_process_group(words)


def learnt(batch: Distilled) -> int:
    """Samples that the batch is learnt from: none of a stand-in's."""
    return len(batch.share)
