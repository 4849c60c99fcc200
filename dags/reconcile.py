"""Makes up for lost push events: an Airflow DAG that compares what was pushed with what was built and started."""

from pathlib import Path

from airloom.dag_factory import reconcile_dag, use_configs

use_configs(Path(__file__).parent / "configs")
dag = reconcile_dag()
