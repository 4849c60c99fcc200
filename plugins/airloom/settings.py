"""Every setting, read once, typed, from the environment, `.env.local` and `.env` in that order.

Names are the field names in capitals with the prefix `AIRLOOM_`. Secrets are not settings: each is a
file in `secrets_dir`, made by `airloom init`, and read when it is needed.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import stat
from functools import cached_property, lru_cache
from pathlib import Path
from urllib.parse import quote

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from airloom.errors import ConfigError

SECRET_NAMES = (
    "admin_password",  # Airflow's and the git server's administrator
    "airflow_api_secret",  # signs Airflow's sessions
    "airflow_jwt_secret",  # signs Airflow's API tokens
    "airflow_fernet_key",  # encrypts Airflow's connections
    "git_password",  # of the user `airloom`, who writes version tags
    "s3_admin_secret",
    "s3_airloom_secret",
    "s3_mlflow_secret",
    "s3_jwt_secret",  # guards the object store's internal ports
    "webhook_secret",  # signs push events
    "jenkins_hook_token",  # in the address of the hooks that lead to Jenkins; chooses its jobs
    "serving_admin_token",  # needed to swap a served model
    "registry_password",  # of the image registry's user
    # Of the stack alone
    "mysql_root_password",
    "mysql_source_password",  # of the source data's owner
    "mysql_source_reader_password",  # of the user that pipelines read it as
    "mysql_airloom_password",  # the prediction log and the ledger
    "mysql_gitbucket_password",
    "mysql_exporter_password",
    "postgres_password",
    "airflow_db_password",
    "mlflow_db_password",
    "redis_password",
    "jupyter_token",
)

_SOCKET_PATH_BYTES = 100  # Linux takes 107; a few are left for a suffix
_NOT_IN_FOLDERS = "$?:\n"
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]+")


def project_root() -> Path:
    """The folder of the project: `AIRLOOM_PROJECT`, or the nearest one above that holds dags/configs."""
    named = os.environ.get("AIRLOOM_PROJECT")
    if named:
        return Path(named).resolve()
    for start in (Path.cwd(), Path(__file__)):
        for folder in (start, *start.parents):
            if (folder / "dags" / "configs").is_dir():
                return folder.resolve()
    raise ConfigError(
        f"no Airloom project in {Path.cwd()} or above",
        hint="change to the folder with dags/configs, or name it in AIRLOOM_PROJECT",
    )


class Settings(BaseSettings):
    """See `.env` for what each means to people."""

    model_config = SettingsConfigDict(env_prefix="AIRLOOM_", extra="ignore", frozen=True)

    project: Path = Field(default_factory=project_root)
    home: Path = Path(".airloom")
    secrets: str = ""
    configs: str = ""
    bind_host: str = "127.0.0.1"
    public_host: str = ""
    runner: str = ""
    deploy_target: str = ""

    airflow_port: int = Field(default=8080, gt=0, lt=65536)
    git_port: int = Field(default=8081, gt=0, lt=65536)
    mlflow_port: int = Field(default=5000, gt=0, lt=65536)
    s3_port: int = Field(default=9000, gt=0, lt=65536)
    gateway_port: int = Field(default=8000, gt=0, lt=65536)
    serving_ports: str = Field(default="8100-8119", pattern=r"^\d+-\d+$")
    internal_ports: str = Field(default="8130-8149", pattern=r"^\d+-\d+$")
    stage_slots: int = Field(default=4, gt=0)

    airflow_url: str = ""
    airflow_public_url: str = ""
    git_url: str = ""
    git_public_url: str = ""
    mlflow_url: str = ""
    mlflow_public_url: str = ""
    s3_url: str = ""
    gateway_url: str = ""
    gateway_admin_url: str = ""
    supervisor_url: str = ""
    jenkins_url: str = ""
    build_url: str = ""
    metrics_networks: str = ""
    database_url: str = ""

    instance: str = ""
    stack: str = Field(default="airloom", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    docker_host: str = ""
    docker_network: str = "host"
    registry: str = ""
    registry_url: str = ""
    registry_port: int = Field(default=5050, gt=0, lt=65536)
    registry_user: str = ""
    build_host: str = ""
    build_certs: str = ""
    build_registry: str = ""
    image_namespace: str = Field(default="airloom", pattern=r"^[a-z0-9]+(?:[._/-][a-z0-9]+)*$")
    python_image: str = "python:3.11.15-slim-bookworm"
    training_base_image: str = ""
    torch_backend: str = ""
    wheels: str = ""
    ca_bundle: str = ""

    git_owner: str = "airloom"
    git_user: str = "airloom"
    s3_region: str = "us-east-1"
    reconcile_minutes: int = Field(default=5, ge=0, le=59)
    seed_source: bool = True
    s3_quota_mib: int = Field(default=0, ge=0)
    bucket_raw: str = "raw"
    bucket_dvc: str = "dvc"
    bucket_mlflow: str = "mlflow"
    bucket_airloom: str = "airloom"

    @field_validator("project", "home")
    @classmethod
    def _usable_folder(cls, value: Path) -> Path:
        wrong = sorted(set(str(value)) & set(_NOT_IN_FOLDERS))
        if wrong:
            raise ValueError(
                f"{str(value)!r} has {' '.join(map(repr, wrong))} in it, to which addresses of databases and lists of "
                "paths give another meaning; use another folder"
            )
        return value

    @field_validator("build_host")
    @classmethod
    def _registry_between(cls, value: str, info: ValidationInfo) -> str:
        if value and not info.data.get("registry"):
            raise ValueError(
                "images get from the engine that builds to the one that runs by AIRLOOM_REGISTRY, which is empty"
            )
        return value

    @field_validator("metrics_networks")
    @classmethod
    def _networks(cls, value: str) -> str:
        for network in value.split():
            ipaddress.ip_network(network)
        return value

    @cached_property
    def home_dir(self) -> Path:
        """State of this installation: data of the embedded services, logs, workspaces."""
        return self.home if self.home.is_absolute() else self.project / self.home

    @cached_property
    def secrets_dir(self) -> Path:
        """One file for each secret: `secrets` in the home, but where Compose mounts them in a container."""
        return Path(self.secrets) if self.secrets else self.home_dir / "secrets"

    @cached_property
    def log_dir(self) -> Path:
        return self.home_dir / "logs"

    @cached_property
    def run_dir(self) -> Path:
        """Sockets and process ids: nothing that outlives a stop."""
        return self.home_dir / "run"

    @cached_property
    def stack_file(self) -> Path:
        """How this machine's commands reach the stack while it is up; before every other file of settings."""
        return self.run_dir / "stack.env"

    @cached_property
    def data_dir(self) -> Path:
        """Data of the embedded services: data/s3, data/git, data/mlflow, data/airflow."""
        return self.home_dir / "data"

    @cached_property
    def gateway_dir(self) -> Path:
        """The gateway's working folder: who deploys writes there, for each pipeline, who answers."""
        return self.data_dir / "gateway"

    @cached_property
    def workspaces_dir(self) -> Path:
        """`<pipeline>/<run>/<stage>`: a stage's request, result, inputs and outputs."""
        return self.home_dir / "workspaces"

    @cached_property
    def checkouts_dir(self) -> Path:
        """`<repo>/<commit>`: read-only trees of stage code."""
        return self.home_dir / "checkouts"

    @cached_property
    def releases_dir(self) -> Path:
        """`<pipeline>/<version>`: what a serving process needs to start without any other service."""
        return self.home_dir / "releases"

    @cached_property
    def dvc_cache_dir(self) -> Path:
        """The cache that all workspaces share, in DVC's own layout."""
        return self.home_dir / "dvc-cache"

    @cached_property
    def configs_dir(self) -> Path:
        """The pipelines' YAML: of the project, or of the DAG bundle's commit that this process has loaded."""
        return Path(self.configs) if self.configs else self.project / "dags" / "configs"

    # Where people's browsers find each service, which in the stack's containers is not where programs do.

    @cached_property
    def page_host(self) -> str:
        """The name of this machine in links."""
        everywhere = self.bind_host in {"0.0.0.0", "::"}  # noqa: S104 - compared, not bound
        return self.public_host or ("localhost" if everywhere else self.bind_host)

    @cached_property
    def airflow_page_url(self) -> str:
        return self.airflow_public_url or self.airflow_url or f"http://{self.page_host}:{self.airflow_port}"

    @cached_property
    def git_page_url(self) -> str:
        return self.git_public_url or self.git_url or f"http://{self.page_host}:{self.git_port}"

    @cached_property
    def mlflow_page_url(self) -> str:
        return self.mlflow_public_url or self.mlflow_url or f"http://{self.page_host}:{self.mlflow_port}"

    # Where clients reach each service: the embedded one unless the environment says otherwise.

    @cached_property
    def airflow_api_url(self) -> str:
        return self.airflow_url or f"http://{self.bind_host}:{self.airflow_port}"

    @cached_property
    def git_base_url(self) -> str:
        return self.git_url or f"http://{self.bind_host}:{self.git_port}"

    @cached_property
    def mlflow_api_url(self) -> str:
        return self.mlflow_url or f"http://{self.bind_host}:{self.mlflow_port}"

    @cached_property
    def s3_endpoint_url(self) -> str:
        return self.s3_url or f"http://{self.bind_host}:{self.s3_port}"

    @cached_property
    def gateway_base_url(self) -> str:
        return self.gateway_url or f"http://{self.bind_host}:{self.gateway_port}"

    @cached_property
    def gateway_admin(self) -> str:
        """`http://…` or `unix:<path>`."""
        return self.gateway_admin_url or f"unix:{self.socket_path('gateway.sock')}"

    @cached_property
    def supervisor(self) -> str:
        """`http://…` or `unix:<path>`."""
        return self.supervisor_url or f"unix:{self.socket_path('supervisor.sock')}"

    @cached_property
    def database(self) -> str:
        """SQLAlchemy URL of the prediction log and the ledger of task outcomes.

        An AIRLOOM_DATABASE_URL with a user and no password gets the secret `mysql_airloom_password`.
        """
        found = re.fullmatch(r"(?P<driver>[^:]+)://(?P<user>[^:@/]+)@(?P<rest>.+)", self.database_url)
        if found:
            password = quote(self.secret("mysql_airloom_password"), safe="")
            return f"{found['driver']}://{found['user']}:{password}@{found['rest']}"
        return self.database_url or f"sqlite:///{self.data_dir / 'ledger' / 'ledger.db'}"

    def internal_port(self, number: int) -> int:
        """The port at this offset of `internal_ports`: 0-9 are the object store's, 10-19 Airflow's.

        Raises:
            ConfigError: the range ends before it.
        """
        first, last = (int(part) for part in self.internal_ports.split("-"))
        if not 0 <= number <= last - first:
            raise ConfigError(
                f"AIRLOOM_INTERNAL_PORTS is {self.internal_ports!r}, which has no port number {number}",
                hint="give it a range of at least 20 ports, such as 8130-8149",
            )
        return first + number

    @cached_property
    def instance_id(self) -> str:
        """Tells this installation's processes and containers from another's; its children have it as AIRLOOM_INSTANCE.

        In the stack's containers, whose folders are all called the same, it is the stack's name.
        """
        return self.instance or hashlib.sha256(os.fsencode(self.home_dir.resolve())).hexdigest()[:16]

    def socket_path(self, name: str) -> Path:
        """Where the Unix socket `name` stands: in `run_dir`, or in a short private folder under /tmp.

        A socket's path holds at most 107 bytes, and not every program takes spaces in one, while the
        project may lie in a folder of any name.

        Raises:
            ConfigError: somebody else owns the folder under /tmp.
        """
        path = self.run_dir / name
        if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES and _PLAIN_PATH.fullmatch(str(path)):
            return path
        folder = Path("/tmp") / f"airloom-{os.getuid()}-{self.instance_id}"  # noqa: S108 - 0700, owner checked
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ConfigError(
                f"{folder} is not a private folder of this user (owner {found.st_uid}, mode {found.st_mode:o})",
                hint="remove it, or use a home folder with a short name of plain letters",
            )
        return folder / name

    def secret(self, name: str) -> str:
        """Read one secret.

        Raises:
            ConfigError: `airloom init` has not been run, or the file cannot be read.
        """
        path = self.secrets_dir / name
        try:
            return path.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(
                f"the secret {name!r} cannot be read from {path}: {error.strerror}", hint="run: airloom init"
            ) from error


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process.

    Raises:
        ConfigError: a value is wrong; the message names the variable, the value and what is allowed.
    """
    from pydantic import ValidationError

    root = project_root()
    _check_names(root / ".env.local", root / ".env")
    try:
        plain = Settings(_env_file=(root / ".env", root / ".env.local"), project=root)
        if not plain.stack_file.exists():
            return plain
        return Settings(_env_file=(root / ".env", root / ".env.local", plain.stack_file), project=root)
    except ValidationError as error:
        lines = [
            f"AIRLOOM_{str(detail['loc'][0]).upper()}: {detail['msg']}, found {detail['input']!r}"
            for detail in error.errors()
        ]
        raise ConfigError("\n".join(lines), hint=f"see {root / '.env'}") from error


def _check_names(local: Path, documented: Path) -> None:
    """Raises ConfigError for a name in `.env.local` that is no setting: it would do nothing, and nobody would know."""
    if not local.exists():
        return
    from dotenv import dotenv_values

    def own(path: Path) -> set[str]:
        return {name.removeprefix("AIRLOOM_") for name in dotenv_values(path) if name.startswith("AIRLOOM_")}

    fields = {name.upper() for name in Settings.model_fields}
    unknown = own(local) - fields
    if not unknown:  # every command and every parsing comes here
        return
    import difflib

    known = fields | own(documented)
    for name in sorted(unknown - known):
        close = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"{local}: AIRLOOM_{name} is no setting",
            hint=f"did you mean AIRLOOM_{close[0]}?" if close else f"{documented} lists them",
        )
