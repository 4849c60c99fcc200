"""The dashboards over a platform that has really run: what Grafana would show after a person's first two runs."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

import yaml

from airloom.errors import AirloomError
from tests.e2e.actions import predicted
from tests.e2e.conftest import Platform
from tests.fixtures.prometheus import (
    PrometheusApi,
    check_rules,
    embedded_addresses,
    local_config,
    running_prometheus,
    wait_for_no_problem,
    wait_for_panels,
)

# What the embedded platform has no service or no exporter for; tests/integration/test_monitoring.py has these.
ABSENT = {"airflow", "cadvisor", "dcgm", "grafana", "jenkins", "minio", "mysql", "node", "pushgateway"}


def test_every_panel_shows_data_of_real_runs(platform: Platform, tmp_path: Path) -> None:
    # Another model, so that the gate has two to compare: the first run had no champion.
    written = platform.config.read_text()
    config = yaml.safe_load(written)
    config["stages"]["train"]["seed"] += 1
    platform.config.write_text(yaml.safe_dump(config, sort_keys=False))
    try:
        summary = platform.run()
    finally:
        platform.config.write_text(written)  # later tests compare their runs with the first one
    assert summary["state"] == "success", summary
    assert summary["verdict"] in {"promoted", "rejected"}, summary
    configured, absent = local_config(embedded_addresses(platform.settings))
    assert absent == ABSENT | {"registry"}
    stop = threading.Event()

    def clients() -> None:
        while not stop.wait(0.2):
            with suppress(AirloomError):  # what matters is that it goes on
                predicted(platform)

    busy = threading.Thread(target=clients)
    with running_prometheus(configured, tmp_path) as url:
        busy.start()
        try:
            left_out = wait_for_panels(url, absent_jobs=absent)
        finally:
            stop.set()
            busy.join(120)
        assert all(query.jobs <= absent for query in left_out)
        assert check_rules(url)["airloom:serving_requests:rate5m"] > 0
        api = PrometheusApi(url)
        wait_for_no_problem(url)
        assert set(api.jobs()) == {"airloom", "serving", "gateway", "mlflow", "git", "seaweedfs", "prometheus"}
