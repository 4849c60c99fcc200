"""The specification of a pipeline: one YAML in dags/configs, one frozen model, no I/O beyond that file."""

from airloom.spec.load import load_pipeline, load_pipelines, parse_pipeline
from airloom.spec.pipeline import PipelineSpec

__all__ = ["PipelineSpec", "load_pipeline", "load_pipelines", "parse_pipeline"]
