"""The pages that Airloom adds to Airflow's server: runs, receipts and metrics."""
