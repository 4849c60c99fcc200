"""What child processes inherit."""

from __future__ import annotations

from airloom.embedded.environment import base_environment, child_environment
from airloom.settings import Settings


def test_only_named_variables_are_inherited(settings: Settings) -> None:
    source = {
        "PATH": "/usr/bin:/bin",
        "HOME": "/home/ada",
        "SSL_CERT_FILE": "/etc/ssl/ca.pem",
        "REQUESTS_CA_BUNDLE": "/etc/ssl/ca.pem",
        "AWS_SECRET_ACCESS_KEY": "mine",
        "MLFLOW_TRACKING_URI": "http://elsewhere",
        "AIRFLOW_HOME": "/elsewhere",
        "HTTP_PROXY": "http://proxy",
        "DOCKER_HOST": "tcp://engine:2376",
        "DOCKER_TLS_VERIFY": "1",
        "AIRLOOM_S3_PORT": "1",
        "AIRLOOM_UNKNOWN": "1",
    }
    environment = base_environment(settings, source)
    own = {name for name in environment if not name.startswith("AIRLOOM_")}
    assert own == {
        "PATH",
        "HOME",
        "USER",
        "LANG",
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
        "DOCKER_HOST",
        "DOCKER_TLS_VERIFY",
    }
    assert environment["HOME"] == "/home/ada"
    assert environment["PATH"].endswith(":/usr/bin:/bin")
    assert environment["LANG"] == "C.UTF-8"
    assert "AIRLOOM_UNKNOWN" not in environment


def test_settings_in_force_are_passed_on_and_read_back_the_same(settings: Settings) -> None:
    environment = base_environment(settings, {})
    assert environment["AIRLOOM_S3_PORT"] == str(settings.s3_port)
    values = {
        name.removeprefix("AIRLOOM_").lower(): v for name, v in environment.items() if name.startswith("AIRLOOM_")
    }
    assert Settings(_env_file=None, **values) == settings  # type: ignore[arg-type]


def test_no_secret_is_in_the_base(settings: Settings) -> None:
    assert not [value for value in base_environment(settings, {}).values() if value.startswith("test-")]


def test_marks_cannot_be_replaced_by_a_service(settings: Settings) -> None:
    environment = child_environment(settings, "s3", {"AIRLOOM_INSTANCE": "other", "EXTRA": "1"})
    assert environment["AIRLOOM_INSTANCE"] == settings.instance_id
    assert environment["AIRLOOM_SERVICE"] == "s3"
    assert environment["EXTRA"] == "1"
