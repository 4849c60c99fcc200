"""Dashboard: what answers requests, how fast, and what becomes of the predictions."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from monitoring.grafana.panels import (
    AIRFLOW_HOME,
    AIRFLOW_RUNS,
    MLFLOW_VERSION,
    RECEIPTS,
    Query,
    board,
    graph,
    listing,
    number,
)

P = 'pipeline=~"$pipeline"'
RELEASE = "{{pipeline}} {{release}}"


def build() -> dashboard.Dashboard:
    """Traffic, errors and latency by release; the gateway; the prediction log."""
    found = board("airloom-releases", "API and releases", "What answers requests, and how well.")
    for part in (_answers, _inside, _predictions, _gateway):
        found = part(found)
    return found


def _answers(found: dashboard.Dashboard) -> dashboard.Dashboard:
    latency = f"airloom:serving_latency_seconds_bucket:rate5m{{{P}}}"
    return (
        found.with_row(dashboard.Row("Releases"))
        .with_panel(
            listing(
                "What answers",
                "Releases that the gateway sends traffic to; two of a pipeline are a canary. A row leads to the model.",
                "short",
                Query(f"sum by (pipeline, release, model_version) (airloom_serving_model_info{{{P}}})"),
                link=MLFLOW_VERSION,
                columns=("pipeline", "release", "model_version"),
                value="processes",
            )
        )
        .with_panel(
            graph(
                "Share of the traffic",
                "Predictions by release: a canary takes its steps here.",
                "percentunit",
                Query(
                    f'sum by (pipeline, release) (airloom:serving_requests:rate5m{{{P}, route=~"/predict.*"}})'
                    " / on (pipeline) group_left sum by (pipeline)"
                    f' (airloom:serving_requests:rate5m{{{P}, route=~"/predict.*"}} > 0)',
                    RELEASE,
                ),
                link=AIRFLOW_RUNS,
                maximum=1,
            )
        )
        .with_panel(
            graph(
                "Requests",
                "Answers by release, of all routes, over 5 minutes.",
                "reqps",
                Query(f"sum by (pipeline, release) (airloom:serving_requests:rate5m{{{P}}})", RELEASE),
                link=AIRFLOW_RUNS,
            )
        )
        .with_panel(
            graph(
                "Answers by status",
                "4xx are the client's mistakes: a file that is no picture, too large, too many at once. 5xx are ours.",
                "reqps",
                Query(f"sum by (pipeline, status) (airloom:serving_requests:rate5m{{{P}}})", "{{pipeline}} {{status}}"),
                link=AIRFLOW_RUNS,
                stacked=True,
            )
        )
        .with_panel(
            graph(
                "Failed predictions",
                "Share of predictions with a status of 500 or more over 10 minutes. An alert fires at 1 %.",
                "percentunit",
                Query(f"airloom:serving_errors:ratio10m{{{P}}}", RELEASE),
                link=AIRFLOW_RUNS,
            )
        )
        .with_panel(
            graph(
                "Latency",
                "Of a prediction, from the request's headers to its answer, in the process: the network is not in it.",
                "s",
                Query(f"histogram_quantile(0.5, {latency})", f"{RELEASE} p50"),
                Query(f"airloom:serving_latency_seconds:p95{{{P}}}", f"{RELEASE} p95"),
                Query(f"histogram_quantile(0.99, {latency})", f"{RELEASE} p99"),
                link=AIRFLOW_RUNS,
            )
        )
    )


def _inside(found: dashboard.Dashboard) -> dashboard.Dashboard:
    batch = f"rate(airloom_serving_batch_size_%s{{{P}}}[$__rate_interval])"
    return (
        found.with_row(dashboard.Row("Inside the processes"))
        .with_panel(
            graph(
                "Waiting",
                "Requests that are being read or answered, and those of them that wait for the model.",
                "short",
                Query(f"sum by (pipeline) (airloom_serving_in_flight{{{P}}})", "{{pipeline}} in flight"),
                Query(f"sum by (pipeline) (airloom_serving_queue{{{P}}})", "{{pipeline}} waiting"),
                link=AIRFLOW_RUNS,
            )
        )
        .with_panel(
            graph(
                "Batch size",
                "Requests that the model saw at once, on the mean. More under load is what batching is for.",
                "short",
                Query(f"sum by (pipeline) ({batch % 'sum'}) / sum by (pipeline) ({batch % 'count'})", "{{pipeline}}"),
                link=AIRFLOW_RUNS,
            )
        )
        .with_panel(
            graph(
                "Processor time",
                "Processors that a process keeps busy.",
                "short",
                Query(
                    f'rate(process_cpu_seconds_total{{job="serving", {P}}}[$__rate_interval])',
                    "{{pipeline}} {{instance}}",
                ),
                link=AIRFLOW_RUNS,
            )
        )
        .with_panel(
            graph(
                "Memory",
                "Resident memory of each process.",
                "bytes",
                Query(f'process_resident_memory_bytes{{job="serving", {P}}}', "{{pipeline}} {{instance}}"),
                link=AIRFLOW_RUNS,
            )
        )
    )


def _predictions(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("Prediction log"))
        .with_panel(
            number(
                "Answers without a receipt",
                "Answers within the time shown that could not be kept. More than none raises an alert.",
                "short",
                Query(
                    f"sum by (pipeline) (increase(airloom_serving_unlogged_predictions_total{{{P}}}[$__range]))",
                    "{{pipeline}}",
                ),
                link=RECEIPTS,
                bad_from=1,
                decimals=0,
            )
        )
        .with_panel(
            number(
                "Swaps of models",
                "Models swapped in a running process, by outcome, since it started; none is the rule.",
                "short",
                Query(
                    "sum by (pipeline, outcome) (airloom_serving_swaps_total) or vector(0)", "{{pipeline}} {{outcome}}"
                ),
                link=AIRFLOW_RUNS,
                decimals=0,
            )
        )
        .with_panel(
            graph(
                "Journal",
                "Answers that the prediction log does not have yet. They are safe in the journal until it does.",
                "bytes",
                Query(f"sum by (pipeline) (airloom_serving_journal_backlog_bytes{{{P}}})", "{{pipeline}}"),
                link=RECEIPTS,
            )
        )
        .with_panel(
            graph(
                "Moved to the prediction log",
                "Predictions that reached the database, and batches that it refused.",
                "cps",
                Query(
                    f"sum by (pipeline) (rate(airloom_serving_drained_predictions_total{{{P}}}[$__rate_interval]))",
                    "{{pipeline}} kept",
                ),
                Query(
                    f"sum by (pipeline) (rate(airloom_serving_drain_failures_total{{{P}}}[$__rate_interval]))",
                    "{{pipeline}} refused batches",
                ),
                link=RECEIPTS,
            )
        )
    )


def _gateway(found: dashboard.Dashboard) -> dashboard.Dashboard:
    # Caddy names the first handler of a route, whatever answers in the end; these two are the gateway's own.
    models = '{handler!~"metrics|static_response"}'
    seconds = f"caddy_http_request_duration_seconds_%s{models}"
    return (
        found.with_row(dashboard.Row("Gateway"))
        .with_panel(
            graph(
                "Requests at the gateway",
                "What clients get, by status: 502 is a release that does not answer, 503 one that is full.",
                "reqps",
                Query(f"sum by (code) (rate({seconds % 'count'}[$__rate_interval]))", "{{code}}"),
                link=AIRFLOW_HOME,
                stacked=True,
            )
        )
        .with_panel(
            graph(
                "Latency at the gateway",
                "Time of 95 of 100 requests, with repeats at another process.",
                "s",
                Query(
                    f"histogram_quantile(0.95, sum by (le) (rate({seconds % 'bucket'}[$__rate_interval])))",
                    "p95",
                ),
                link=AIRFLOW_HOME,
            )
        )
        .with_panel(
            graph(
                "Models in reach",
                "1 while the gateway can connect to a serving process of the pipeline, 0 while all refuse.",
                "short",
                Query("airloom:gateway_reaches:max", "{{pipeline}}"),
                link=AIRFLOW_HOME,
                maximum=1,
            )
        )
    )
