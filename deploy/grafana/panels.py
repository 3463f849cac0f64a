"""How the boards look: each kind of panel in one place, over Grafana's own builders."""

from collections.abc import Mapping, Sequence
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
    xychart,
)
from grafana_foundation_sdk.models import common as styles
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heat_models
from grafana_foundation_sdk.models import prometheus as prom_models
from grafana_foundation_sdk.models import xychart as xy_models

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
RUN = "{{tenant}} / {{job}}"
REFS = "ABCDEFGHIJKL"
Steps = Sequence[tuple[float | None, str]]
"""(from, colour), the first from None."""
SHARE_LEFT: Steps = ((None, "red"), (0.1, "orange"), (0.25, "green"))
CURRENCIES = ("EUR", "USD", "GBP", "JPY", "CHF")
"""Of which Grafana has units; others are shown by their name."""


def query(expr: str, legend: str = "__auto", ref: str = "A", form: str = "time_series") -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .datasource(DATASOURCE)
        .expr(expr)
        .legend_format(legend)
        .ref_id(ref)
        .format(prom_models.PromQueryFormat(form))
        .editor_mode(prom_models.QueryEditorMode.CODE)
    )


def asked(panel: Any, queries: Mapping[str, str], *, now: bool = False, form: str = "time_series") -> Any:
    """`queries`: {legend: expression}. `now`: their value at the range's end, instead of over it."""
    for ref, (legend, expr) in zip(REFS, queries.items(), strict=False):
        one = query(expr, legend, ref, form)
        panel.with_target(one.instant() if now else one.range())
    return panel


def begun(panel: Any, title: str, unit: str, what: str, size: tuple[int, int]) -> Any:
    panel.title(title).unit(unit).datasource(DATASOURCE).span(size[0]).height(size[1])
    return panel.description(what) if what else panel


def thresholds(panel: Any, steps: Steps) -> Any:
    made = [models.Threshold(value=start, color=colour) for start, colour in steps]
    return panel.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(made))


def coloured(panel: Any, mode: models.FieldColorModeId) -> Any:
    return panel.color_scheme(dashboard.FieldColor().mode(mode))


def override(panel: Any, name: str, **properties: object) -> Any:
    """Of the field of that name, or of those that a /regex/ matches."""
    values = [models.DynamicConfigValue(key.replace("__", "."), value) for key, value in properties.items()]
    return (panel.override_by_regexp if name.startswith("/") else panel.override_by_name)(name, values)


def in_money(panel: Any) -> Any:
    for name in CURRENCIES:
        override(panel, f"/{name}$/", unit=f"currency{name}")
    return panel


def figure(
    title: str,
    queries: Mapping[str, str] | str,
    unit: str,
    what: str = "",
    *,
    steps: Steps = ((None, "blue"),),
    empty: str = "none",
    width: int = 4,
    decimals: int | None = None,
) -> Any:
    """A large number, of the range's end; several have names."""
    queries = {"__auto": queries} if isinstance(queries, str) else queries
    named = queries.keys() != {"__auto"}
    panel = begun(stat.Panel(), title, unit, what, (width, 4)).no_value(empty)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    panel.graph_mode(styles.BigValueGraphMode.NONE).color_mode(styles.BigValueColorMode.VALUE)
    panel.text_mode(styles.BigValueTextMode.VALUE_AND_NAME if named else styles.BigValueTextMode.VALUE)
    if decimals is not None:
        panel.decimals(decimals)
    thresholds(panel, steps)
    coloured(panel, models.FieldColorModeId.THRESHOLDS)
    return asked(panel, queries, now=True)


def lines(
    title: str,
    queries: Mapping[str, str],
    unit: str,
    what: str = "",
    *,
    stacked: bool = False,
    width: int = 12,
    height: int = 8,
    top: float | None = None,
    axis: str = "",
    steps: Steps = (),
    points: bool = False,
) -> Any:
    panel = begun(timeseries.Panel(), title, unit, what, (width, height)).min(0)
    panel.line_width(0 if stacked else 1).fill_opacity(60 if stacked else 8).span_nulls(False)
    panel.show_points(styles.VisibilityMode.ALWAYS if points else styles.VisibilityMode.NEVER)
    panel.axis_label(axis).point_size(5)
    if stacked:
        panel.stacking(common.StackingConfig().mode(styles.StackingMode.NORMAL).group("A"))
    if top is not None:
        panel.max(top)
    if steps:
        thresholds(panel, steps)
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(styles.GraphThresholdsStyleMode.DASHED))
    coloured(panel, models.FieldColorModeId.PALETTE_CLASSIC)
    panel.legend(_legend()).tooltip(_tooltip())
    return asked(panel, queries)


def _legend() -> common.VizLegendOptions:
    mode, place = styles.LegendDisplayMode.LIST, styles.LegendPlacement.BOTTOM
    return common.VizLegendOptions().display_mode(mode).placement(place).show_legend(True).calcs([])


def _tooltip(mode: str = "multi") -> common.VizTooltipOptions:
    return common.VizTooltipOptions().mode(styles.TooltipDisplayMode(mode)).sort(styles.SortOrder.DESCENDING)


def bars(
    title: str,
    queries: Mapping[str, str],
    unit: str,
    what: str = "",
    *,
    width: int = 8,
    height: int = 8,
    top: float | None = None,
    empty: str = "nothing in this range",
) -> Any:
    panel = begun(bargauge.Panel(), title, unit, what, (width, height)).min(0).no_value(empty)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    panel.orientation(styles.VizOrientation.HORIZONTAL).display_mode(styles.BarGaugeDisplayMode.BASIC)
    panel.value_mode(styles.BarGaugeValueMode.TEXT).show_unfilled(True)
    panel.name_placement(styles.BarGaugeNamePlacement.LEFT).sizing(styles.BarGaugeSizing.AUTO)
    if top is not None:
        panel.max(top)
    coloured(panel, models.FieldColorModeId.PALETTE_CLASSIC_BY_NAME)
    return asked(panel, queries, now=True)


def heat(title: str, buckets: str, unit: str, what: str = "", *, width: int = 12, decimals: int | None = None) -> Any:
    """Of a histogram's buckets by `le`: each column one moment, each cell how many a second fell between two bounds."""
    panel = begun(heatmap.Panel(), title, unit, what, (width, 8)).calculate(False).max_data_points(120)
    colour = heatmap.HeatmapColorOptions().mode(heat_models.HeatmapColorMode.SCHEME).scheme("Blues").steps(64)
    panel.color(colour.scale(heat_models.HeatmapColorScale.EXPONENTIAL).exponent(0.5).fill("dark-blue"))
    axis = heatmap.YAxisConfig().unit(unit).axis_placement(styles.AxisPlacement.LEFT).reverse(False)
    panel.y_axis(axis if decimals is None else axis.decimals(decimals))
    panel.filter_values(heatmap.FilterValueRange().le(1e-9)).cell_gap(1).show_legend()
    panel.cell_values(heatmap.CellValues().unit("short"))
    panel.rows_frame(heatmap.RowsHeatmapOptions().layout(styles.HeatmapCellLayout.AUTO))
    panel.mode(styles.TooltipDisplayMode.SINGLE).show_y_histogram()
    return asked(panel, {"{{le}}": buckets}, form="heatmap")


def states(title: str, queries: Mapping[str, str], what: str, *, good: str, bad: str, width: int = 12) -> Any:
    """Of what is 1 or 0, over time."""
    panel = begun(statetimeline.Panel(), title, "bool", what, (width, 6)).row_height(0.8).fill_opacity(70)
    panel.show_value(styles.VisibilityMode.NEVER).merge_values(True).legend(_legend())
    results = {
        "1": models.ValueMappingResult(text=good, color="green", index=0),
        "0": models.ValueMappingResult(text=bad, color="red", index=1),
    }
    panel.mappings([models.ValueMap(options=results)])
    thresholds(panel, ((None, "red"), (1, "green")))
    coloured(panel, models.FieldColorModeId.THRESHOLDS)
    return asked(panel, queries)


def rows(
    title: str,
    columns: Mapping[str, tuple[str, str]],
    what: str = "",
    *,
    labels: Sequence[str],
    order_by: str,
    rising: bool = False,
    left_out: str = "",
    hidden: Sequence[str] = (),
    width: int = 24,
    height: int = 9,
) -> Any:
    """A table. `columns`: {heading: (expression, unit)}, all by `labels`, which make a row. `left_out`: the heading of
    which a row has 0 that is not shown."""
    panel = begun(table.Panel(), title, "short", what, (width, height)).show_header(True).filterable(True)
    panel.cell_height(styles.TableCellHeight.SM)
    panel.sort_by([common.TableSortByFieldState().display_name(order_by).desc(not rising)])
    asked(panel, {heading: expr for heading, (expr, _) in columns.items()}, now=True, form="table")
    values = [f"Value #{ref}" for ref, _ in zip(REFS, columns, strict=False)]
    order = {name: place for place, name in enumerate((*labels, *values))}
    organised = {
        "excludeByName": dict.fromkeys(("Time", "__name__", *hidden), True),
        "indexByName": order,
        "renameByName": dict(zip(values, columns, strict=True)),
    }
    panel.with_transformation(models.DataTransformerConfig("merge", options={}))
    panel.with_transformation(models.DataTransformerConfig("organize", options=organised))
    if left_out:
        nothing = {"fieldName": left_out, "config": {"id": "equal", "options": {"value": 0}}}
        without = {"type": "exclude", "match": "any", "filters": [nothing]}
        panel.with_transformation(models.DataTransformerConfig("filterByValue", options=without))
    for heading, (_, unit) in columns.items():
        override(panel, heading, unit=unit)
    return panel


def against(title: str, x: tuple[str, str], y: tuple[str, str, str], what: str, *, top: float | None = None) -> Any:
    """One quantity against another, a line for each job. x: (axis, expression), y: (axis, expression, unit), both by
    tenant and job, and both there at the same moments.

    Each query is a table; merged, a row is a moment of a job; then a frame for each job.
    """
    panel = begun(xychart.Panel(), title, "short", what, (12, 10)).max_data_points(300)
    (x_axis, x_expr), (y_axis, y_expr, y_unit) = x, y
    asked(panel, {x_axis: x_expr, y_axis: y_expr}, form="table")
    panel.with_transformation(models.DataTransformerConfig("merge", options={}))
    parted = {"fields": ["tenant", "job"], "keepFields": False, "naming": {"asLabels": True}}
    panel.with_transformation(models.DataTransformerConfig("partitionByValues", options=parted))

    def matched(name: str) -> xychart.MatcherConfig:
        return xychart.MatcherConfig().id("byName").options(name)

    panel.mapping(xy_models.SeriesMapping.AUTO).series(
        [
            xychart.XYSeriesConfig()
            .x(xychart.XychartXYSeriesConfigX().matcher(matched("Value #A")))
            .y(xychart.XychartXYSeriesConfigY().matcher(matched("Value #B")))
        ]
    )
    panel.show(xy_models.XYShowMode.POINTS_AND_LINES).line_width(1)
    panel.point_size(xychart.XychartFieldConfigPointSize().fixed(5))
    panel.legend(_legend()).tooltip(_tooltip("single"))
    coloured(panel, models.FieldColorModeId.PALETTE_CLASSIC)
    override(panel, "Value #A", displayName=x_axis, unit="short", custom__axisLabel=x_axis)
    name = "${__field.labels.tenant} / ${__field.labels.job}"
    limits = {"min": 0} | ({} if top is None else {"max": top})
    return override(panel, "Value #B", displayName=name, unit=y_unit, custom__axisLabel=y_axis, **limits)
