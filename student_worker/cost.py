"""What a step costs, in forward FLOPs (arXiv 2012.09413; docs/unix.md, "Cost")."""

import math


def computation(
    *, asked: float, scored: float, learnt: float, teacher_flops: float, student_flops: float, backward: float = 1.0
) -> float:
    """FLOPs of a run: asked * F_t + scored * F_s + learnt * (1 + backward) * F_s.

    `asked`, `scored` and `learnt` count samples: answered by a teacher's forward pass, scored by the student's, and
    learnt from. `teacher_flops` and `student_flops` are F_t and F_s, those of one forward pass of one sample;
    `backward` is a backward pass in forwards (1 in the paper's figures, 2 by the usual count).
    A share is the ratio of two such totals. Raises ValueError for a number below 0 or not finite.
    """
    for name, value in {
        "asked": asked,
        "scored": scored,
        "learnt": learnt,
        "teacher_flops": teacher_flops,
        "student_flops": student_flops,
        "backward": backward,
    }.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}: give a finite number >= 0")
    return asked * teacher_flops + (scored + learnt * (1 + backward)) * student_flops


def computation_share(
    *, batch: int, keep: int, teacher_flops: float, student_flops: float, backward: float = 1.0
) -> float:
    """The paper's special case: UNIX, which scores a batch and keeps some of it, as a share of plain KD on all of it.

    `batch` and `keep` count samples; the rest as in `computation`. It counts a scoring pass, so it is not for KD (1 by
    definition), for random selection (which scores nothing), or for stored answers: use `computation` there.
    Raises ValueError for a keep outside 1..batch, a negative number, or FLOPs that are both 0.
    """
    if not 1 <= keep <= batch:
        raise ValueError(f"keep is {keep}: it counts samples of a batch of {batch}, so give 1..{batch}")
    flops = {"teacher_flops": teacher_flops, "student_flops": student_flops, "backward": backward}
    full = computation(asked=batch, scored=0, learnt=batch, **flops)
    if full == 0:
        raise ValueError("teacher_flops and student_flops are both 0: a share of nothing is undefined")
    return computation(asked=keep, scored=batch, learnt=keep, **flops) / full
