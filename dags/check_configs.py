"""Shows every invalid YAML in configs/ as an Airflow import error: one of this file, so that no DAG is lost by it."""

from airloom.dag_factory import check_configs

check_configs()
