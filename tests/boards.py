"""Grafana's boards as they are in files, and what they show to somebody who looks."""

import json

from tests.serving import ROOT

FOLDER = ROOT / "deploy/grafana"
BOARDS = {file.stem: json.loads(file.read_text()) for file in sorted((FOLDER / "dashboards").glob("*.json"))}
RATE, STEP, RANGE = 5, 3, 600
"""What stands for Grafana's intervals, in seconds: five scrapes, three, and more than it all takes."""


def panels(board):
    """Those that show something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def targets_of(uid, title):
    """The queries of a panel."""
    (panel,) = (panel for panel in panels(BOARDS[uid]) if panel["title"] == title)
    return panel["targets"]


def everything(value):
    """All dicts in it, itself included."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from everything(part)


def asked(expression, interval):
    """As Grafana asks it, with all tenants and jobs chosen."""
    for name, value in (("__rate_interval", RATE), ("__interval", interval), ("__range", RANGE)):
        expression = expression.replace(f"${name}", f"{value}s")
    return expression.replace("$tenant", ".*").replace("$job", ".*")


class Looked:
    """What Grafana shows to somebody who looks at a moment (s since 1970), with all that came before since `since`."""

    def __init__(self, watched, since, moment):
        self._watched, self._since, self.moment = watched, since, moment

    def series(self, expression, *, instant=False, step=1):
        """[(labels, [[time, value], ...]), ...]"""
        if instant:
            found = self._watched.api("/api/v1/query", query=asked(expression, step), time=self.moment)
            return [(one["metric"], [one["value"]]) for one in found["data"]["result"]]
        start, end = (int(when) // step * step for when in (self._since + step, self.moment))  # Grafana aligns them too
        found = self._watched.api("/api/v1/query_range", query=asked(expression, step), start=start, end=end, step=step)
        return [(one["metric"], one["values"]) for one in found["data"]["result"]]

    def shown(self, target):
        return self.series(target["expr"], instant=target.get("instant", False))

    def figures(self, uid, title, ref="A"):
        """{(tenant, job): value} of a table's or figure's query; of all together: the value."""
        (target,) = (target for target in targets_of(uid, title) if target["refId"] == ref)
        found = {
            (labels.get("tenant"), labels.get("job")): float(values[-1][1]) for labels, values in self.shown(target)
        }
        return found[None, None] if found.keys() == {(None, None)} else found

    def column(self, uid, title, heading):
        """The figures of a table's column."""
        (panel,) = (panel for panel in panels(BOARDS[uid]) if panel["title"] == title)
        (organised,) = (one["options"] for one in panel["transformations"] if one["id"] == "organize")
        (value,) = (value for value, name in organised["renameByName"].items() if name == heading)
        return self.figures(uid, title, value[-1])
