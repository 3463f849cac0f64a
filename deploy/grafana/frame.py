"""What all boards share: variables, links to each other, marks where jobs begin and end."""

from collections.abc import Mapping, Sequence
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as models
from panels import DATASOURCE
from queries import of, summed

BOARDS = {
    "preceptor-compute": "Teacher compute",
    "preceptor-serving": "Serving",
    "preceptor-students": "Students",
}
"""By uid."""
_KNOWN = '__name__=~"preceptor_asked_samples_total|preceptor_student_info"'
_STEP = "2m"


class Mark(models.AnnotationQuery):
    """An annotation of Prometheus, with the fields that the SDK lacks.

    Grafana 11 reads `expr` and `step`, later ones `target`.
    """

    def to_json(self) -> dict[str, object]:
        target = {"expr": self.expr, "interval": _STEP, "range": True, "instant": False, "refId": "Anno"}
        words = {"tagKeys": "tenant,job", "textFormat": "{{tenant}} / {{job}}", "titleFormat": self.name}
        return super().to_json() | {"step": _STEP, "target": target} | words


class _Built:
    def __init__(self, mark: Mark) -> None:
        self._mark = mark

    def build(self) -> Mark:
        return self._mark


def _marks() -> list[Any]:
    """A job asks, and did not in the step before; or the other way round. The windows tile the time, so that each is
    true at one step alone, whatever the range: one mark."""
    asks = of("preceptor_asked_samples_total")
    now = f"{summed(f'rate({asks}[$__interval])', 'tenant, job')} > 0"
    before = f"{summed(f'rate({asks}[$__interval] offset $__interval)', 'tenant, job')} > 0"
    return [
        _Built(Mark(name="Job starts", datasource=DATASOURCE, icon_color="green", expr=f"{now} unless {before}")),
        _Built(Mark(name="Job ends", datasource=DATASOURCE, icon_color="orange", expr=f"{before} unless {now}")),
    ]


def _chosen(name: str, label: str, within: str) -> dashboard.QueryVariable:
    made = (
        dashboard.QueryVariable(name).label(label).datasource(DATASOURCE).query(f"label_values({{{within}}}, {name})")
    )
    made.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
    made.multi(True).include_all(True).all_value(".*")
    return made.current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))


def board(uid: str, what: str, since: str, refresh: str, content: Mapping[str, Sequence[Any]]) -> models.Dashboard:
    """`content`: {heading: panels}, in reading order; those under the heading "" come first, without one."""
    made = dashboard.Dashboard(f"Preceptor: {BOARDS[uid]}").uid(uid).description(what).tags(["preceptor"])
    made.time(f"now-{since}", "now").refresh(refresh).tooltip(models.DashboardCursorSync.CROSSHAIR)
    made.timezone("browser")
    made.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    made.with_variable(_chosen("tenant", "Tenant", _KNOWN))
    made.with_variable(_chosen("job", "Job", f'{_KNOWN}, tenant=~"$tenant"'))
    for mark in _marks():
        made.annotation(mark)
    for other, title in BOARDS.items():
        if other != uid:
            link = dashboard.DashboardLink(title).type(models.DashboardLinkType.LINK).icon("dashboard")
            made.link(link.url(f"/d/{other}").keep_time(True).include_vars(True).target_blank(False).as_dropdown(False))
    number = 0
    for heading, panels in content.items():
        if heading:
            number += 1
            made.with_row(dashboard.Row(heading).id(number))
        for panel in panels:
            number += 1
            made.with_panel(panel.id(number))
    return made.build()
