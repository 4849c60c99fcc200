"""Each valid YAML in configs/ becomes an Airflow DAG. The invalid ones are reported by check_configs.py."""

from pathlib import Path

from airloom.dag_factory import pipeline_dags, use_configs

use_configs(Path(__file__).parent / "configs")
globals().update({dag.dag_id: dag for dag in pipeline_dags()})
