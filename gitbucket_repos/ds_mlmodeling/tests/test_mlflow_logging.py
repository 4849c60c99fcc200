"""What a stage leaves in MLflow, however often it is tried."""

from __future__ import annotations

from pathlib import Path

import pytest
from modeling_samples import PARAMS, request_for

from airloom.contract import Stage, StageResult, Tracking, sha256_tree
from airloom.contract.model import load_predictor
from modeling.evaluate import evaluate
from modeling.train import train

FACTS = {"data_tag": "shapes/CV_x_00000000_DV_20260101T000000000Z", "data_md5": "0123456789abcdef.dir"}


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    import mlflow

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("shapes", artifact_location=f"file://{folder}/artifacts")
    run_id = client.create_run(experiment).info.run_id
    return Tracking(uri=uri, experiment="shapes", run_id=run_id)


def test_a_stage_tried_twice_logs_once(tracking: Tracking, trained: StageResult, dataset: Path, tmp_path: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking.uri)
    request = request_for(Stage.TRAIN, {"dataset": dataset}, tmp_path, tracking=tracking, facts=FACTS)
    first = train(request)
    second = train(request)
    uri = first.facts["model_uri"]
    assert second.facts["model_uri"] == uri

    run = client.get_run(tracking.run_id)
    assert run.data.params["learning_rate"] == str(PARAMS["learning_rate"])
    assert [given.dataset.name for given in run.inputs.dataset_inputs] == [FACTS["data_tag"]]
    steps = [metric.step for metric in client.get_metric_history(tracking.run_id, "validation_loss")]
    assert steps == list(range(1, PARAMS["epochs"] + 1))
    models = client.search_logged_models([run.info.experiment_id])
    assert [f"models:/{model.model_id}" for model in models] == [uri]
    assert models[0].source_run_id == tracking.run_id
    assert str(models[0].status) == "READY"

    # What MLflow hands out is the artifact, byte for byte, beside a note of its own.
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "downloaded")))
    (folder / "registered_model_meta").unlink(missing_ok=True)
    assert sha256_tree(folder) == first.facts["model_digest"]
    assert load_predictor(folder)[0].facts["data_md5"] == FACTS["data_md5"]

    version = client.create_registered_model("shapes") and client.create_model_version(
        "shapes", source=uri, run_id=tracking.run_id, model_id=uri.rpartition("/")[2]
    )
    assert version.source == uri

    figures = evaluate(
        request_for(Stage.EVALUATE, {"dataset": dataset, "model": folder}, tmp_path, tracking=tracking)
    ).metrics
    logged = client.get_run(tracking.run_id).data.metrics
    assert {name: logged[name] for name in figures} == figures
    names = {item.path for item in client.list_artifacts(tracking.run_id, "report")}
    assert {"report/confusion_matrix.png", "report/reference.json"} <= names


def test_a_model_that_was_half_uploaded_is_filled_up(tracking: Tracking, model: Path) -> None:
    import mlflow

    from modeling.logged_model import DIGEST_TAG, log_model

    client = mlflow.MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name("shapes").experiment_id
    run_id = client.create_run(experiment).info.run_id
    digest = sha256_tree(model)
    half = client.create_logged_model(experiment, name="shapes", source_run_id=run_id, tags={DIGEST_TAG: digest})
    client.log_model_artifact(half.model_id, str(model / "model.json"))
    uri = log_model(client, model, experiment_id=experiment, run_id=run_id, name="shapes", digest=digest, params={})
    assert uri == f"models:/{half.model_id}"
    assert str(client.get_logged_model(half.model_id).status) == "READY"
    folder = Path(mlflow.artifacts.download_artifacts(uri, tracking_uri=tracking.uri))
    assert load_predictor(folder)[0].classes


def test_mlflow_that_does_not_answer_is_worth_another_try(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Tracking(uri="http://127.0.0.1:9", experiment="shapes", run_id="0" * 32)
    with pytest.raises(ConnectionError, match=r"MLflow at http://127\.0\.0\.1:9 does not answer"):
        train(request_for(Stage.TRAIN, {"dataset": dataset}, tmp_path, tracking=away))
