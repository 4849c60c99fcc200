"""Dashboard: what the models can do, what the gate decided, and what the data are like."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from monitoring.grafana.panels import (
    AIRFLOW_RUNS,
    MLFLOW_HOME,
    MLFLOW_MODEL,
    RELEASES,
    Query,
    bars,
    board,
    graph,
    listing,
    number,
)

P = 'pipeline=~"$pipeline"'


def build() -> dashboard.Dashboard:
    """The gate's decisions and figures, the stages' figures, datasets and predicted classes."""
    found = board("airloom-models", "Model, gate and data", "How good the models are, and on what data.")
    for part in (_gate, _model, _data):
        found = part(found)
    return found


def _gate(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("Gate"))
        .with_panel(
            number(
                "Rejected in a row",
                "Candidates that the gate has rejected since it last promoted one. An alert fires at 3.",
                "short",
                Query(f"max by (pipeline) (airloom_gate_rejections_in_a_row{{{P}}})", "{{pipeline}}"),
                link=AIRFLOW_RUNS,
                bad_from=3,
            )
        )
        .with_panel(
            number(
                "Decisions",
                "All decisions of the gate by verdict.",
                "short",
                Query(f"sum by (pipeline, verdict) (airloom_gate_verdicts_total{{{P}}})", "{{pipeline}} {{verdict}}"),
                link=AIRFLOW_RUNS,
            )
        )
        .with_panel(
            bars(
                "Better than the champion by",
                "The candidate's figure less the champion's on the same data version; for a loss, less is better.",
                "none",
                Query(
                    f'max by (pipeline, metric) (airloom_gate_metric{{{P}, model="candidate"}})'
                    f' - max by (pipeline, metric) (airloom_gate_metric{{{P}, model="champion"}})',
                    "{{pipeline}} {{metric}}",
                ),
                link=MLFLOW_MODEL,
            )
        )
        .with_panel(
            graph(
                "What the gate decided on",
                "Figures of candidate and champion at each decision.",
                "none",
                Query(
                    f"max by (pipeline, model, metric) (airloom_gate_metric{{{P}}})",
                    "{{pipeline}} {{metric}} {{model}}",
                ),
                link=MLFLOW_MODEL,
            )
        )
        .with_panel(
            graph(
                "Decisions within a day",
                "Promoted and rejected candidates.",
                "short",
                Query(
                    f"sum by (pipeline, verdict) (increase(airloom_gate_verdicts_total{{{P}}}[1d]))",
                    "{{pipeline}} {{verdict}}",
                ),
                link=AIRFLOW_RUNS,
                stacked=True,
            )
        )
    )


def _model(found: dashboard.Dashboard) -> dashboard.Dashboard:
    own = 'metric!~"size_bytes|files|stage_seconds"'
    return (
        found.with_row(dashboard.Row("Model"))
        .with_panel(
            listing(
                "Figures of the evaluation",
                "All figures of the latest evaluation, on data that training never saw.",
                "none",
                Query(
                    "max by (pipeline, metric)"
                    f' (airloom_stage_metric{{{P}, stage="evaluate", metric!~"size_bytes|files|stage_seconds"}})'
                ),
                link=("Model in MLflow", "${mlflow:raw}/#/models/${__data.fields.pipeline}"),
                columns=("pipeline", "metric"),
                value="figure",
            )
        )
        .with_panel(
            graph(
                "Figures of training",
                "What training reported at its end; curves over steps and epochs are in MLflow.",
                "none",
                Query(
                    f'max by (pipeline, metric) (airloom_stage_metric{{{P}, stage="train", {own}}})',
                    "{{pipeline}} {{metric}}",
                ),
                link=MLFLOW_MODEL,
            )
        )
        .with_panel(
            graph(
                "Predicted classes",
                "Share of each class in the answers of an hour. A shift without a new release is a hint of drift.",
                "percentunit",
                Query(
                    f"sum by (pipeline, label) (rate(airloom_serving_predictions_total{{{P}}}[1h]))"
                    " / on (pipeline) group_left sum by (pipeline)"
                    f" (rate(airloom_serving_predictions_total{{{P}}}[1h]) > 0)",
                    "{{pipeline}} {{label}}",
                ),
                link=RELEASES,
                stacked=True,
                maximum=1,
            )
        )
        .with_panel(
            graph(
                "Requests at MLflow",
                "By status; training, the gate and releases speak to it.",
                "reqps",
                Query("sum by (status) (rate(mlflow_http_request_total[$__rate_interval]))", "{{status}}"),
                link=MLFLOW_HOME,
                stacked=True,
            )
        )
    )


def _data(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("Data"))
        .with_panel(
            graph(
                "Size of the data version",
                "Bytes of the latest data version of each pipeline.",
                "bytes",
                Query(f"max by (pipeline) (airloom_dataset_size_bytes{{{P}}})", "{{pipeline}}"),
                link=AIRFLOW_RUNS,
            )
        )
        .with_panel(
            graph(
                "Files of the data version",
                "Packed files of the latest data version of each pipeline.",
                "short",
                Query(f"max by (pipeline) (airloom_dataset_files{{{P}}})", "{{pipeline}}"),
                link=AIRFLOW_RUNS,
            )
        )
        .with_panel(
            listing(
                "Figures of preprocessing",
                "Rows by split, rejected rows and whatever else the latest preprocessing counted.",
                "none",
                Query(f'max by (pipeline, metric) (airloom_stage_metric{{{P}, stage="preprocess"}})'),
                link=("Runs in Airflow", "${airflow:raw}/dags/${__data.fields.pipeline}/runs"),
                columns=("pipeline", "metric"),
                value="figure",
            )
        )
        .with_panel(
            graph(
                "Requests at the object store",
                "Of all users and kinds.",
                "reqps",
                Query(
                    "sum(rate(minio_s3_requests_total[$__rate_interval]))"
                    " or sum(rate(SeaweedFS_s3_request_total[$__rate_interval]))",
                    "requests",
                ),
                link=MLFLOW_HOME,
            )
        )
    )
