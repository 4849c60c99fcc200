"""Store a model artifact in MLflow, once for each run, however often the stage is tried."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIGEST_TAG = "airloom.digest"


def log_model(
    client: MlflowClient,
    folder: Path,
    *,
    experiment_id: str,
    run_id: str,
    name: str,
    digest: str,
    params: Mapping[str, str],
) -> str:
    """Store the artifact in `folder` and return its URI, `models:/m-…`.

    It becomes READY only when all of it is there. A try that was killed on the way left it PENDING: the next
    one fills the same model up. A model of this run with other bytes gives way to this one.
    """
    from mlflow.entities import LoggedModelStatus

    found = client.search_logged_models(
        [experiment_id], filter_string=f"source_run_id = '{run_id}' AND name = '{name}'"
    )
    same = [model for model in found if model.tags.get(DIGEST_TAG) == digest]
    for model in found:
        if model not in same[:1]:
            client.delete_logged_model(model.model_id)
    model = (
        same[0]
        if same
        else client.create_logged_model(
            experiment_id,
            name=name,
            source_run_id=run_id,
            tags={DIGEST_TAG: digest},
            params=dict(params),
            model_type="classification",
        )
    )
    if model.status != LoggedModelStatus.READY:
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return f"models:/{model.model_id}"
