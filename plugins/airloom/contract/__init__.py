"""The whole contract between the platform and a stage: frozen models, file formats and grammar.

Stage code imports this package and what its own image has; nothing else of Airloom. Importing it
costs pydantic alone: modules that need pyarrow or SQLAlchemy are imported by name where they are used.
"""

from airloom.contract.base import Frozen
from airloom.contract.card import DataCard, RejectedRow
from airloom.contract.digest import canonical_json, sha256_bytes, sha256_file, sha256_json, sha256_tree
from airloom.contract.enums import DeployTarget, ExitCode, Runner, Stage, Verdict
from airloom.contract.image import ImageRef
from airloom.contract.outcome import Deployment, StageOutcome, ValidationReport, VerifyReport
from airloom.contract.plan import CodePin, DataVersion, RunPlan, SourcePin, StagePin, Trigger
from airloom.contract.release import GateDecision, Receipt, Release
from airloom.contract.request import StageRequest, Tracking
from airloom.contract.result import Output, StageResult
from airloom.contract.stage import StageInputError, run_stage_main
from airloom.contract.version_tag import VersionTag

__all__ = [
    "CodePin",
    "DataCard",
    "DataVersion",
    "DeployTarget",
    "Deployment",
    "ExitCode",
    "Frozen",
    "GateDecision",
    "ImageRef",
    "Output",
    "Receipt",
    "RejectedRow",
    "Release",
    "RunPlan",
    "Runner",
    "SourcePin",
    "Stage",
    "StageInputError",
    "StageOutcome",
    "StagePin",
    "StageRequest",
    "StageResult",
    "Tracking",
    "Trigger",
    "ValidationReport",
    "Verdict",
    "VerifyReport",
    "VersionTag",
    "canonical_json",
    "run_stage_main",
    "sha256_bytes",
    "sha256_file",
    "sha256_json",
    "sha256_tree",
]
