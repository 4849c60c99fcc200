"""Dashboards, rules and provisioning as files: complete, built from their code, and in step with each other."""

from __future__ import annotations

import ipaddress
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from airloom.embedded.gateway_server import base_config
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.prometheus import DASHBOARDS, MONITORING, RULES, panel_queries, rule_expressions
from tests.fixtures.statsd import MAPPING, known_names

GUIDE = MONITORING.parent / "docs" / "how-to" / "monitoring.md"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}
PANELS = [
    pytest.param(panel, id=f"{name}-{panel['title']}")
    for name, board in BOARDS.items()
    for panel in board["panels"]
    if panel["type"] != "row"
]

# Their value says nothing: it is 0, or a forecast below 0.
WITHOUT_VALUE = {
    "TargetDown",
    "AirflowHeartbeatMissing",
    "ReleaseUnreachable",
    "ModelNotLoaded",
    "DatabaseDown",
    "DiskFillsUp",
}


def alerts() -> dict[str, dict[str, Any]]:
    rules = [rule for path in sorted(RULES.glob("*.yml")) for group in _groups(path) for rule in group["rules"]]
    return {rule["alert"]: rule for rule in rules if "alert" in rule}


def _groups(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load(path.read_text())["groups"])


def test_the_dashboards_are_what_their_code_makes() -> None:
    from monitoring.grafana.build import built

    assert {path.name: path.read_text() for path in DASHBOARDS.glob("*.json")} == built()


def test_there_are_three_dashboards_that_lead_to_each_other() -> None:
    assert {board["title"] for board in BOARDS.values()} == {
        "Pipelines and stages",
        "API and releases",
        "Model, gate and data",
    }
    for uid, board in BOARDS.items():
        assert board["uid"] == uid
        (link,) = board["links"]
        assert (link["type"], link["tags"]) == ("dashboards", board["tags"])


@pytest.mark.parametrize("panel", PANELS)
def test_each_panel_has_unit_description_and_a_link_on(panel: dict[str, Any]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    assert panel["description"].endswith(".")
    assert all(link["title"] and link["url"] for link in defaults["links"])
    assert defaults["links"]
    assert panel["targets"]
    assert {target["datasource"]["uid"] for target in panel["targets"]} == {"prometheus"}


@pytest.mark.parametrize("uid", BOARDS)
def test_panels_lie_beside_each_other(uid: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in BOARDS[uid]["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert len({panel["id"] for panel in BOARDS[uid]["panels"]}) == len(BOARDS[uid]["panels"])


def test_links_use_no_address_and_no_dashboard_that_is_not_there() -> None:
    for board in BOARDS.values():
        variables = {variable["name"] for variable in board["templating"]["list"]}
        for panel in board["panels"]:
            for link in panel.get("fieldConfig", {}).get("defaults", {}).get("links", ()):
                used = re.findall(r"\$\{(\w+):raw\}", link["url"])
                assert set(used) <= variables
                own = re.match(r"/d/([\w-]+)", link["url"])
                assert used or (own and own[1] in BOARDS), link["url"]


def test_no_variable_is_left_in_a_query() -> None:
    left = [query for query in panel_queries() if "$" in query.expr]
    assert left == []


def test_every_record_is_used() -> None:
    used = " ".join([query.expr for query in panel_queries()] + [expr for _, expr in rule_expressions()])
    records = [name for name, _ in rule_expressions() if ":" in name]
    assert [name for name in records if name not in used] == []


def test_names_of_rules_are_unique() -> None:
    names = [name for name, _ in rule_expressions()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", alerts())
def test_each_alert_says_what_how_much_and_what_to_do(name: str) -> None:
    alert = alerts()[name]
    notes = alert["annotations"]
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert notes.keys() == {"summary", "description", "action", "runbook"}
    assert notes["runbook"] == f"docs/how-to/monitoring.md#{name.lower()}"
    assert ("$value" in notes["description"]) == (name not in WITHOUT_VALUE)


def test_each_alert_has_a_section_in_the_guide_and_no_section_is_left_over() -> None:
    sections = re.findall(r"^### (\w+)$", GUIDE.read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(alerts())


def test_each_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fires, quiet = set(), set()
    for path in (MONITORING / "prometheus" / "tests").glob("*.yml"):
        for test in yaml.safe_load(path.read_text())["tests"]:
            assert test["input_series"], path
            for case in test["alert_rule_test"]:
                (fires if case.get("exp_alerts") else quiet).add(case["alertname"])
    assert fires == set(alerts())
    assert quiet == set(alerts())


def test_what_is_mapped_is_what_this_airflow_sends() -> None:
    names = known_names()
    mapping = yaml.safe_load(MAPPING.read_text())["mappings"]
    exact = [rule["match"].removeprefix("airflow.") for rule in mapping if rule.get("match_type") != "regex"]
    assert [name for name in exact if name not in names] == []
    assert mapping[-1] == {"match": ".*", "match_type": "regex", "action": "drop", "name": "dropped"}
    for name in [rule["name"] for rule in mapping[:-1]]:
        assert re.fullmatch(r"airflow_[a-z_]+(\$1)?", name)


def test_every_service_has_one_job_and_grafana_reads_what_is_provisioned() -> None:
    config = yaml.safe_load((MONITORING / "prometheus" / "prometheus.yml").read_text())
    jobs = [job["job_name"] for job in config["scrape_configs"]]
    assert len(jobs) == len(set(jobs))
    provisioning = MONITORING / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert (source["uid"], source["type"]) == ("prometheus", "prometheus")
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "airloom.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


def test_airflow_sends_what_the_mapping_reads(settings: Settings) -> None:
    from airloom.stack.container import STATISTICS, airflow_environment

    assert STATISTICS.items() <= airflow_environment(settings).items()
    head = MAPPING.read_text().partition("defaults:")[0]
    for option in ("statsd_on", "statsd_influxdb_enabled", "legacy_names_on", "statsd_prefix"):
        assert f"{option}={STATISTICS[f'AIRFLOW__METRICS__{option.upper()}']}" in head


def test_metrics_of_the_gateway_are_for_its_neighbours_and_not_for_who_comes_through_the_host() -> None:
    from airloom.stack.container import neighbours

    columns = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT"
    default = "eth0 00000000 010011AC 0003 0 0 0 00000000 0 0 0"
    own = "eth0 000011AC 00000000 0001 0 0 0 0000FFFF 0 0 0"
    other = "eth1 0000A8C0 00000000 0001 0 0 0 00FFFFFF 0 0 0"
    networks = [ipaddress.ip_network(text) for text in neighbours("\n".join([columns, default, own, other]))]

    def reads(text: str) -> bool:
        return any(ipaddress.ip_address(text) in network for network in networks)

    assert [reads(f"172.17.0.{last}") for last in (0, 2, 3, 255)] == [True] * 4
    assert reads("172.17.255.254")
    assert reads("192.168.0.7")
    assert not reads("172.17.0.1")
    assert not reads("172.18.0.2")
    assert not reads("10.0.0.1")
    assert neighbours(f"{columns}\n") == []


def test_metrics_of_the_gateway_are_for_this_machine_and_named_networks(tmp_path: Path) -> None:
    def readers(**values: str) -> list[str]:
        routes = base_config(make_settings(tmp_path, **values), [])["apps"]["http"]["servers"]["gateway"]["routes"]
        return list(routes[0]["match"][0]["remote_ip"]["ranges"])

    own = ["127.0.0.0/8", "::1/128"]
    assert readers() == own
    assert readers(metrics_networks="172.30.0.0/24  fd00::/8") == [*own, "172.30.0.0/24", "fd00::/8"]
    with pytest.raises(ValidationError, match=r"metrics_networks[\s\S]*does not appear to be"):
        readers(metrics_networks="everybody")
