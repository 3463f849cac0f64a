"""What a sweep tries: fields of a run and the values that each may take, as plain JSON or TOML."""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

Draw = Callable[[random.Random], Any]

KINDS = ("choice", "uniform", "loguniform", "randint")


def points(space: Sequence[Mapping[str, Any]], trials: int, seed: int) -> list[dict[str, Any]]:
    """The values of every trial, in the order of the tables in `space`, one after another.

    In a table, a list is a grid: all grids are crossed. A table with one of the keys of KINDS is drawn from anew for
    each of `trials` trials at each point of the grid: {"choice": [values]}, {"uniform": [low, high]} and {"loguniform":
    [low, high]} (real numbers), {"randint": [low, high]} (whole ones, below high), all as in Ray Tune. Anything else
    is the value itself. Equal arguments give equal trials. Raises ValueError, which names the field, for a distribution
    that is none, an empty grid, and more than one trial where nothing is drawn.
    """
    draws = random.Random(seed)  # noqa: S311 - not for secrets
    found: list[dict[str, Any]] = []
    anything_drawn = False
    for table in space:
        grids = {name: value for name, value in table.items() if isinstance(value, list)}
        drawn = {name: _draw(name, value) for name, value in table.items() if _is_drawn(value)}
        fixed = {name: value for name, value in table.items() if name not in grids | drawn}
        anything_drawn |= bool(drawn)
        for name, values in grids.items():
            if not values:
                raise ValueError(f"{name}: an empty list leaves nothing to try")
        for combination in itertools.product(*grids.values()):
            grid = dict(zip(grids, combination, strict=True))
            for _ in range(trials if drawn else 1):
                point = fixed | grid | {name: draw(draws) for name, draw in drawn.items()}
                found.append({name: point[name] for name in table})
    if trials > 1 and not anything_drawn:
        raise ValueError(
            f"trials is {trials}, and nothing in the space is drawn, so each trial would only come again; for "
            'repetitions sweep the seed: "seed": [0, 1, 2]'
        )
    return found


def _is_drawn(value: object) -> bool:
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)) in KINDS


def _draw(name: str, value: Mapping[str, Any]) -> Draw:
    ((kind, of),) = value.items()
    if kind == "choice":
        if not isinstance(of, list) or not of:
            raise ValueError(f"{name}: choice takes a list of values, got {of!r}")
        return partial(_choice, of)
    if not isinstance(of, list) or len(of) != 2 or not all(_is_number(bound) for bound in of):
        raise ValueError(f"{name}: {kind} takes [low, high], got {of!r}")
    low, high = of
    if low >= high or (kind == "loguniform" and low <= 0):
        above = "0 < low < high" if kind == "loguniform" else "low < high"
        raise ValueError(f"{name}: {kind} takes [low, high] with {above}, got {of!r}")
    if kind == "randint":
        if not all(isinstance(bound, int) for bound in of):
            raise ValueError(f"{name}: randint takes whole numbers, got {of!r}")
        return lambda draws: draws.randrange(low, high)
    if kind == "loguniform":
        return lambda draws: min(high, max(low, math.exp(draws.uniform(math.log(low), math.log(high)))))
    return lambda draws: draws.uniform(low, high)


def _choice(values: Sequence[Any], draws: random.Random) -> Any:
    return draws.choice(values)


def _is_number(bound: object) -> bool:
    return isinstance(bound, int | float) and not isinstance(bound, bool) and math.isfinite(bound)
