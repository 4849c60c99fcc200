"""Dashboard: pipelines and stages, and the machine that they run on."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from monitoring.grafana.panels import (
    AIRFLOW_HOME,
    AIRFLOW_RUNS,
    GIT,
    PIPELINES,
    RUN_PAGE,
    Query,
    bars,
    board,
    graph,
    listing,
    number,
)

P = 'pipeline=~"$pipeline"'
# The plugin's library decides on the ending.
JENKINS = '{__name__=~"default_jenkins_builds_%s_build_count(_total)?"}'

REFUSED = '{outcome=~"unsigned|forged|malformed"}'


def build() -> dashboard.Dashboard:
    """What runs, what failed, what takes long, and whether there is room for it."""
    found = board("airloom-pipelines", "Pipelines and stages", "Runs, stages, builds and the machine beneath them.")
    for part in (_now, _stages, _airflow, _builds, _machine):
        found = part(found)
    return found


def _now(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("Now"))
        .with_panel(
            number(
                "Alerts",
                "Alerts that fire now. What each means and what to do stands in docs/how-to/monitoring.md.",
                "short",
                Query('count(ALERTS{alertstate="firing"}) or vector(0)', "firing"),
                link=PIPELINES,
                bad_from=1,
            )
        )
        .with_panel(
            number(
                "Running runs",
                "Runs that have begun and not ended.",
                "short",
                Query(f"sum(airloom_running_runs{{{P}}})", "runs"),
                link=AIRFLOW_HOME,
            )
        )
        .with_panel(
            number(
                "Since the last good run",
                "Time since a run of the pipeline last ended well. An alert fires after 8 days.",
                "s",
                Query(f"time() - max by (pipeline) (airloom_last_success_timestamp_seconds{{{P}}})", "{{pipeline}}"),
                link=AIRFLOW_RUNS,
                bad_from=8 * 86400,
            )
        )
        .with_panel(
            number(
                "Failed runs",
                "Runs that failed within the time shown.",
                "short",
                Query(
                    f'sum by (pipeline) (increase(airloom_runs_total{{{P}, state="failed"}}[$__range]))', "{{pipeline}}"
                ),
                link=AIRFLOW_RUNS,
                bad_from=1,
                decimals=0,
            )
        )
        .with_panel(
            listing(
                "Latest runs",
                "The run of each pipeline that began last; a row leads to the run's page.",
                "dateTimeFromNow",
                Query(f"1000 * max by (pipeline, run_id, state) (airloom_last_run_timestamp_seconds{{{P}}})"),
                link=RUN_PAGE,
                columns=("pipeline", "run_id", "state"),
                value="began",
            )
        )
        .with_panel(
            graph(
                "Runs ended",
                "Runs of the last hour by outcome. The gate's rejection is a success: see the dashboard on models.",
                "short",
                Query(f"sum by (pipeline, state) (increase(airloom_runs_total{{{P}}}[1h]))", "{{pipeline}} {{state}}"),
                link=AIRFLOW_RUNS,
                stacked=True,
            )
        )
    )


def _stages(found: dashboard.Dashboard) -> dashboard.Dashboard:
    seconds = f'airloom_task_duration_seconds_%s{{{P}, state="success"}}'
    return (
        found.with_row(dashboard.Row("Stages"))
        .with_panel(
            bars(
                "Mean time of a task",
                "Wall time of good tries, over all of them; results that were reused count too.",
                "s",
                Query(
                    f"sum by (pipeline, task) ({seconds % 'sum'}) / sum by (pipeline, task) ({seconds % 'count'})",
                    "{{pipeline}} {{task}}",
                ),
                link=AIRFLOW_RUNS,
            )
        )
        .with_panel(
            bars(
                "Slowest tries of a task",
                "95 of 100 good tries took no longer than this; exact to the bounds of the histogram.",
                "s",
                Query(
                    f"histogram_quantile(0.95, sum by (pipeline, task, le) ({seconds % 'bucket'}))",
                    "{{pipeline}} {{task}}",
                ),
                link=AIRFLOW_RUNS,
            )
        )
        .with_panel(
            graph(
                "Failed tries",
                "Tries of tasks that failed within an hour. Airflow may have tried again since.",
                "short",
                Query(
                    f'sum by (pipeline, task) (increase(airloom_task_attempts_total{{{P}, state="failed"}}[1h]))',
                    "{{pipeline}} {{task}}",
                ),
                link=AIRFLOW_RUNS,
                stacked=True,
            )
        )
        .with_panel(
            bars(
                "Results reused",
                "Share of a stage's runs that needed no work, since code, image, data and parameters were the same.",
                "percentunit",
                Query(
                    f'sum by (pipeline, stage) (airloom_stage_cache_total{{{P}, cache="hit"}})'
                    f" / sum by (pipeline, stage) (airloom_stage_cache_total{{{P}}})",
                    "{{pipeline}} {{stage}}",
                ),
                link=AIRFLOW_RUNS,
            )
        )
    )


def _airflow(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("Airflow"))
        .with_panel(
            graph(
                "Heartbeats",
                "Heartbeats of each component. None for 5 minutes raises an alert: runs stand still.",
                "cpm",
                Query("60 * sum by (component) (rate(airflow_heartbeats_total[$__rate_interval]))", "{{component}}"),
                link=AIRFLOW_HOME,
            )
        )
        .with_panel(
            graph(
                "Slots",
                "Tasks that run, wait in the executor's queue, and slots that are free.",
                "short",
                Query("sum(airflow_executor_running_tasks)", "running"),
                Query("sum(airflow_executor_queued_tasks)", "queued"),
                Query("sum(airflow_executor_open_slots)", "free slots"),
                link=AIRFLOW_HOME,
            )
        )
        .with_panel(
            graph(
                "Time in the queue",
                "Mean time from queued to running. It grows when slots or workers are short.",
                "s",
                Query(
                    "sum(rate(airflow_task_queued_duration_seconds_sum[15m]))"
                    " / sum(rate(airflow_task_queued_duration_seconds_count[15m]))",
                    "queued",
                ),
                link=AIRFLOW_HOME,
            )
        )
        .with_panel(
            graph(
                "DAG files",
                "Time to read all DAG files, and how many cannot be imported.",
                "s",
                Query("max(airflow_dag_processing_parse_seconds)", "to read all"),
                Query("max(airflow_dag_processing_import_errors)", "files with errors"),
                link=AIRFLOW_HOME,
            )
        )
    )


def _builds(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("Pushes and builds"))
        .with_panel(
            graph(
                "Pushes and builds of the git server",
                "Refs that pushes changed, and builds by outcome, within an hour. For the git server that comes along.",
                "short",
                Query("sum(increase(airloom_git_pushes_total[1h]))", "pushed refs"),
                Query("sum by (outcome) (increase(airloom_git_builds_total[1h]))", "builds: {{outcome}}"),
                link=GIT,
            )
        )
        .with_panel(
            graph(
                "Builds of Jenkins",
                "Builds by job within an hour, and those that failed.",
                "short",
                Query(
                    f"sum by (jenkins_job) (increase({JENKINS % 'success'}[1h]))",
                    "{{jenkins_job}} good",
                ),
                Query(
                    f"sum by (jenkins_job) (increase({JENKINS % 'failed'}[1h]))",
                    "{{jenkins_job}} failed",
                ),
                link=GIT,
            )
        )
        .with_panel(
            graph(
                "Refused events",
                "Push events without the right signature or form, within an hour; at Jenkins all of its answers 403.",
                "short",
                Query(
                    f"sum by (outcome) (increase(airloom_git_push_events_total{REFUSED}[1h]))",
                    "{{outcome}}",
                ),
                Query('sum(increase(http_responseCodes_forbidden_total{job="jenkins"}[1h]))', "403 of Jenkins"),
                link=GIT,
            )
        )
    )


def _machine(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("Machine"))
        .with_panel(
            graph(
                "Processors",
                "Share of all processors in use.",
                "percentunit",
                Query(
                    'sum by (instance) (rate(node_cpu_seconds_total{mode!~"idle|iowait"}[$__rate_interval]))'
                    ' / count by (instance) (node_cpu_seconds_total{mode="idle"})',
                    "{{instance}}",
                ),
                link=PIPELINES,
                maximum=1,
            )
        )
        .with_panel(
            graph(
                "Memory in use",
                "What is not available to new processes.",
                "bytes",
                Query("node_memory_MemTotal_bytes - node_memory_MemAvailable_bytes", "in use"),
                Query("node_memory_MemTotal_bytes", "all"),
                link=PIPELINES,
            )
        )
        .with_panel(
            graph(
                "Room",
                "Free share of each file system and of the object store. An alert fires below 10 %.",
                "percentunit",
                Query("airloom:filesystem_free:ratio", "{{mountpoint}}"),
                Query("airloom:object_store_free:ratio", "object store"),
                link=PIPELINES,
                maximum=1,
            )
        )
        .with_panel(
            graph(
                "Memory of containers",
                "Working set by service of the stack; stages and releases by their container's name.",
                "bytes",
                Query('sum by (service) (container_memory_working_set_bytes{service!=""})', "{{service}}"),
                Query('sum by (name) (container_memory_working_set_bytes{service="", name!=""})', "{{name}}"),
                link=PIPELINES,
            )
        )
        .with_panel(
            graph(
                "GPUs",
                "Share of the time in which a GPU worked, and of its memory in use.",
                "percentunit",
                Query("DCGM_FI_DEV_GPU_UTIL / 100", "GPU {{gpu}}"),
                Query("DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE)", "GPU {{gpu}} memory"),
                link=PIPELINES,
                maximum=1,
            )
        )
        .with_panel(
            graph(
                "MySQL connections",
                "Open connections, and how many there may be.",
                "short",
                Query("max(mysql_global_status_threads_connected)", "open"),
                Query("max(mysql_global_variables_max_connections)", "limit"),
                link=PIPELINES,
            )
        )
    )
