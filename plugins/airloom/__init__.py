"""Airloom: push code, get a served model, and know where every answer came from.

The package's layers, from top to bottom (an import may only point downwards):

    cli                    says what is to happen
    embedded               the platform without Docker: child processes under one supervisor
    operators, listener    run a stage's life inside Airflow
    flows                  what a task does, in plain Python
    hooks                  one file for each outside system
    spec, contract         frozen models and grammar
    settings, errors       the floor

This module imports nothing, so that stage images and DAG parsing pay for nothing they don't use.
"""

__version__ = "0.1.0"
