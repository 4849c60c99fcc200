"""Shows every invalid YAML in configs/ as an Airflow import error: one of this file, so that no DAG is lost by it."""

from pathlib import Path

from airloom.dag_factory import check_configs, use_configs

use_configs(Path(__file__).parent / "configs")
check_configs()
