"""The few kinds of panel that the dashboards are made of, so that each has a unit, a description and a link on.

Docs of the builders: https://grafana.github.io/grafana-foundation-sdk/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

# Provisioned under this id; see provisioning/datasources.
DATA_SOURCE = models.DataSourceRef(type_val="prometheus", uid="prometheus")
HEIGHT = 8
WIDTHS = {"stat": 6, "timeseries": 12, "table": 12, "bars": 12}

# Where a panel leads on. The addresses come from airloom_addresses_info, so they follow the ports of `.env`.
AIRFLOW_RUNS = ("Runs in Airflow", "${airflow:raw}/dags/${__field.labels.pipeline}/runs")
AIRFLOW_HOME = ("Airflow", "${airflow:raw}/")
RUN_PAGE = ("Page of this run", "${airflow:raw}/airloom/runs/${__data.fields.pipeline}/${__data.fields.run_id}")
RECEIPTS = ("Find a receipt", "${airflow:raw}/airloom/")
MLFLOW_MODEL = ("Model in MLflow", "${mlflow:raw}/#/models/${__field.labels.pipeline}")
MLFLOW_VERSION = (
    "Version in MLflow",
    "${mlflow:raw}/#/models/${__data.fields.pipeline}/versions/${__data.fields.model_version}",
)
MLFLOW_HOME = ("MLflow", "${mlflow:raw}/")
GIT = ("Repositories", "${git:raw}/")
RELEASES = ("API and releases", "/d/airloom-releases?${__url_time_range}&var-pipeline=${__field.labels.pipeline}")
PIPELINES = ("Pipelines and stages", "/d/airloom-pipelines?${__url_time_range}")


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the name of its series; `{{label}}` stands for a label's value."""

    expr: str
    legend: str = ""


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    link: tuple[str, str],
    stacked: bool = False,
    maximum: float | None = None,
) -> timeseries.Panel:
    """Lines over time."""
    legend = common.VizLegendOptions().show_legend(True)
    legend = legend.display_mode(common_models.LegendDisplayMode.TABLE).placement(common_models.LegendPlacement.BOTTOM)
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(DATA_SOURCE)
        .unit(unit)
        .min(0)
        .fill_opacity(20 if stacked else 5)
        .show_points(common_models.VisibilityMode.AUTO)
        .legend(legend.calcs(["lastNotNull", "max"]))
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
        .data_links([_link(link)])
        .height(HEIGHT)
        .span(WIDTHS["timeseries"])
    )
    if maximum is not None:
        panel = panel.max(maximum)
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    for target in _targets(queries, instant=False):
        panel = panel.with_target(target)
    return panel


def number(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    link: tuple[str, str],
    bad_from: float | None = None,
    decimals: int | None = None,
) -> stat.Panel:
    """The value now, red from `bad_from` on."""
    steps = [models.Threshold(value=None, color="green")]
    if bad_from is not None:
        steps.append(models.Threshold(value=bad_from, color="red"))
    thresholds = dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(DATA_SOURCE)
        .unit(unit)
        .thresholds(thresholds)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .data_links([_link(link)])
        .height(HEIGHT // 2)
        .span(WIDTHS["stat"])
    )
    if decimals is not None:
        panel = panel.decimals(decimals)
    for target in _targets(queries, instant=True):
        panel = panel.with_target(target)
    return panel


def bars(title: str, description: str, unit: str, *queries: Query, link: tuple[str, str]) -> bargauge.Panel:
    """One bar for each series, with its value now."""
    panel = (
        bargauge.Panel()
        .title(title)
        .description(description)
        .datasource(DATA_SOURCE)
        .unit(unit)
        .min(0)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .orientation(common_models.VizOrientation.HORIZONTAL)
        .data_links([_link(link)])
        .height(HEIGHT)
        .span(WIDTHS["bars"])
    )
    for target in _targets(queries, instant=True):
        panel = panel.with_target(target)
    return panel


def listing(
    title: str, description: str, unit: str, query: Query, *, link: tuple[str, str], columns: Sequence[str], value: str
) -> table.Panel:
    """One row for each series: these labels, and the value under a name."""
    order = {name: index for index, name in enumerate([*columns, "Value"])}
    organize = models.DataTransformerConfig(
        id_val="organize",
        options={"excludeByName": {"Time": True}, "indexByName": order, "renameByName": {"Value": value}},
    )
    panel = (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(DATA_SOURCE)
        .unit(unit)
        .with_transformation(organize)
        .data_links([_link(link)])
        .height(HEIGHT)
        .span(WIDTHS["table"])
    )
    (target,) = _targets([query], instant=True)
    return panel.with_target(target.format(PromQueryFormat.TABLE))


def variable(name: str, query: str, *, label: str = "", hidden: bool = False) -> dashboard.QueryVariable:
    """A value that the data give: to choose from, or hidden and for links alone."""
    found = (
        dashboard.QueryVariable(name)
        .label(label or name)
        .datasource(DATA_SOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )
    if hidden:
        return found.hide(models.VariableHide.HIDE_VARIABLE)
    everything = models.VariableOption(selected=True, text=["All"], value=["$__all"])
    return found.multi(True).include_all(True).all_value(".+").current(everything)


def board(uid: str, title: str, description: str) -> dashboard.Dashboard:
    """An empty dashboard with the variables that all have, and links to the others."""
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["airloom"])
        .readonly()
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("Airloom")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["airloom"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(variable("pipeline", "label_values(airloom_runs_total, pipeline)", label="Pipeline"))
        .with_variable(variable("airflow", "label_values(airloom_addresses_info, airflow)", hidden=True))
        .with_variable(variable("mlflow", "label_values(airloom_addresses_info, mlflow)", hidden=True))
        .with_variable(variable("git", "label_values(airloom_addresses_info, git)", hidden=True))
    )


def _link(link: tuple[str, str]) -> dashboard.DashboardLink:
    title, url = link
    return dashboard.DashboardLink(title).type(models.DashboardLinkType.LINK).url(url).target_blank(True)


def _targets(queries: Sequence[Query], *, instant: bool) -> list[prometheus.Dataquery]:
    found = []
    for letter, query in zip("ABCDEFGH", queries, strict=False):
        target = prometheus.Dataquery().ref_id(letter).expr(query.expr).datasource(DATA_SOURCE)
        target = target.legend_format(query.legend or "__auto")
        found.append(target.instant() if instant else target.range())
    return found
