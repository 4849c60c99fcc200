"""Each valid YAML in configs/ becomes an Airflow DAG. The invalid ones are reported by check_configs.py."""

from airloom.dag_factory import pipeline_dags

globals().update({dag.dag_id: dag for dag in pipeline_dags()})
