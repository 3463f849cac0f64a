"""PromQL that the boards have in common. Rates and totals come before sums: a replica may restart, come and go."""

JOB = 'tenant=~"$tenant", job=~"$job"'
"""What the board's reader chose; of series that have both labels."""
BUDGET = 'tenant=~"$tenant", job=~"$job|"'
"""The same of budgets: one without a job is the tenant's own, and holds its jobs too."""


def of(metric: str, labels: str = JOB) -> str:
    return f"{metric}{{{labels}}}" if labels else metric


def summed(value: str, by: str = "") -> str:
    return f"sum by ({by}) ({value})" if by else f"sum({value})"


def rate(metric: str, by: str = "", labels: str = JOB) -> str:
    """Per second, summed."""
    return summed(f"rate({of(metric, labels)}[$__rate_interval])", by)


def total(metric: str, by: str = "", labels: str = JOB) -> str:
    """What a counter gained in the board's time range, summed.

    `increase` extrapolates, and does not see what a counter had when it was first scraped: of a job that began in this
    range it misses the first samples. So it serves only where a process restarted meanwhile, or just when the range
    begins (it then has less than before); elsewhere it is the last value less the one at the range's beginning, to the
    sample.
    """
    last = f"last_over_time({of(metric, labels)}[$__range])"
    gained = f"{last} - ({of(metric, labels)} offset $__range or 0 * {last})"
    steady = f"resets({of(metric, labels)}[$__range]) == 0"
    return summed(f"({gained} >= 0) and ({steady}) or increase({of(metric, labels)}[$__range])", by)


def quantile(q: float, metric: str, by: str = "", labels: str = JOB) -> str:
    groups = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', groups, labels)})"


def mean(metric: str, by: str = "", labels: str = JOB) -> str:
    """Of a histogram or summary; no value while nothing is observed."""
    return f"{rate(f'{metric}_sum', by, labels)} / ({rate(f'{metric}_count', by, labels)} > 0)"


def share(part: str, whole: str) -> str:
    """No value where there is no whole."""
    return f"{part} / ({whole} > 0)"
