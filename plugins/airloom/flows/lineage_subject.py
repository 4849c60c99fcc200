"""What a person may ask the lineage of, told apart by how it is written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from airloom.contract.prediction_id import PredictionId
from airloom.contract.version_tag import PIPELINE_PATTERN, VersionTag
from airloom.errors import ContractError, NotFoundError

EXAMPLES = (
    "a version tag, digits/3 or models:/digits/3 (a model version), digits-1.0.4 (a release), a commit, "
    "the id of an Airflow run, an MLflow run or a prediction, or a pipeline"
)


class Kind(StrEnum):
    """Kinds of things that lineage connects."""

    PIPELINE = "pipeline"
    COMMIT = "commit"
    SOURCE = "source"
    ENVIRONMENT = "environment"
    RUN = "run"
    DATA_VERSION = "data version"
    MLFLOW_RUN = "MLflow run"
    MODEL = "logged model"
    MODEL_VERSION = "model version"
    RELEASE = "release"
    DEPLOYMENT = "deployment"


@dataclass(frozen=True)
class Subject:
    """`pipeline` is `None` where the text doesn't tell it."""

    kind: Kind
    name: str
    pipeline: str | None = None


_MODEL_VERSION = re.compile(rf"(?:models:/)?(?P<pipeline>{PIPELINE_PATTERN})/(?P<version>\d+)")
_RELEASE = re.compile(rf"(?P<pipeline>{PIPELINE_PATTERN})[-/ ](?P<release>\d+\.\d+\.\d+)")
_MLFLOW_RUN = re.compile(r"[0-9a-f]{32}")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


def parse_subject(text: str, pipelines: frozenset[str]) -> Subject:
    """Tell what `text` names. What is nothing else is taken for the id of an Airflow run.

    Args:
        pipelines: names of the pipelines there are.

    Raises:
        NotFoundError: it is empty.
    """
    name = text.strip()
    if not name:
        raise NotFoundError("nothing was named", hint=f"give {EXAMPLES}")
    try:
        return Subject(Kind.DATA_VERSION, name, VersionTag.parse(name).pipeline)
    except ContractError:
        pass
    if match := _MODEL_VERSION.fullmatch(name):
        return Subject(Kind.MODEL_VERSION, match["version"], match["pipeline"])
    if match := _RELEASE.fullmatch(name):
        return Subject(Kind.RELEASE, match["release"], match["pipeline"])
    if name.startswith("models:/m-"):
        return Subject(Kind.MODEL, name)
    if name in pipelines:
        return Subject(Kind.PIPELINE, name, name)
    return _by_shape(name)


def _by_shape(name: str) -> Subject:
    try:
        prediction = PredictionId.parse(name)
        return Subject(Kind.RELEASE, prediction.release, prediction.pipeline)
    except NotFoundError:
        pass
    if _MLFLOW_RUN.fullmatch(name):
        return Subject(Kind.MLFLOW_RUN, name)
    if _COMMIT.fullmatch(name):
        return Subject(Kind.COMMIT, name)
    return Subject(Kind.RUN, name)
