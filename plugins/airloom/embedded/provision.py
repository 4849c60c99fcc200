"""Everything that a fresh platform needs before its first run. Idempotent, and the same for every way to run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from airloom.errors import ConfigError, NotFoundError, ServiceError
from airloom.hooks.airflow_api import STAGE_POOL
from airloom.hooks.connect import Hooks
from airloom.operators.registry_login import REGISTRY_CONNECTION
from airloom.settings import Settings

# Called with the name of a step and how far it is; several threads call it.
OnProgress = Callable[[str, str], None]

TEMPLATE_MESSAGE = "Start from the template"
STEPS = ("buckets", "raw data", "repositories", "Airflow", "deployments")

# What working in a template's folder leaves behind.
EXCLUDED = ("__pycache__/", "*.pyc", "*.egg-info/", ".*_cache/", ".venv/", ".git/", ".hypothesis/", ".benchmarks/")


def provision(hooks: Hooks, on_progress: OnProgress = lambda step, state: None, *, seed: bool = True) -> None:
    """Make buckets, repositories with their first push and hook, and Airflow's connections, pool and variables; write
    the demo's data; have every deployed release answer at the gateway.

    Args:
        seed: whether to write the demo's raw data.

    Raises:
        ServiceError: a service refused or did not answer. What was done stays; run it again.
    """
    _buckets(hooks, on_progress)
    with ThreadPoolExecutor(4, thread_name_prefix="provision") as threads:
        tasks = [threads.submit(step, hooks, on_progress) for step in (_repositories, _airflow, _deployments)]
        if seed:
            tasks.append(threads.submit(_raw_data, hooks, on_progress))
        for task in tasks:
            task.result()


def _buckets(hooks: Hooks, on_progress: OnProgress) -> None:
    from airloom.hooks.object_store import ObjectStore

    settings = hooks.settings
    on_progress("buckets", "working")
    admin = ObjectStore.from_settings(settings, user="admin")
    # Versions pin a run's input, though a person may write over a file meanwhile.
    admin.ensure_bucket(settings.bucket_raw, versioned=True)
    plain = (settings.bucket_dvc, settings.bucket_mlflow, settings.bucket_airloom)
    for name in plain:
        admin.ensure_bucket(name)
    on_progress("buckets", f"done: {settings.bucket_raw} (keeps versions), {', '.join(plain)}")


def _raw_data(hooks: Hooks, on_progress: OnProgress) -> None:
    from airloom.embedded.seed import COUNT, PREFIX, seed_digits

    on_progress("raw data", "working")
    written = seed_digits(hooks, lambda done, total: on_progress("raw data", f"{done:,} of {total:,} files"))
    place = f"s3://{hooks.settings.bucket_raw}/{PREFIX}"
    on_progress("raw data", f"done: {COUNT:,} files at {place}" if written else f"done: was at {place} already")


def _repositories(hooks: Hooks, on_progress: OnProgress) -> None:
    from airloom.flows.build import build

    settings = hooks.settings
    folders = sorted(path for path in (settings.project / "gitbucket_repos").glob("*") if path.is_dir())
    pushed = []
    for folder in folders:
        repo = folder.name
        on_progress("repositories", repo)
        hooks.gitbucket.ensure_repo(repo, description(folder))
        if push_template(hooks, repo, folder):
            pushed.append(repo)
            # Built here and told to nobody: the hook comes after, so that the templates start no run.
            build(hooks, repo, "main", announce=False)
        ensure_receiver(hooks, repo)
    names = ", ".join(folder.name for folder in folders) or "none in gitbucket_repos"
    on_progress("repositories", f"done: {names}" + (f" ({len(pushed)} pushed for the first time)" if pushed else ""))


def add_repo(hooks: Hooks, name: str) -> None:
    """Make an empty stage repo whose pushes are built; one that is there keeps what it holds.

    Raises:
        ConfigError: that is no name for a stage repo.
        ServiceError: the git server refused or did not answer.
    """
    from pydantic import TypeAdapter, ValidationError

    from airloom.spec.pipeline import RepoName

    try:
        TypeAdapter(RepoName).validate_python(name)
    except ValidationError as error:
        raise ConfigError(
            f"{name!r} is no name for a stage repo",
            hint="a lower-case letter, then lower-case letters, digits, '_', '-' and '.'; 100 at most",
        ) from error
    hooks.gitbucket.ensure_repo(name)
    ensure_receiver(hooks, name)


def ensure_receiver(hooks: Hooks, repo: str) -> None:
    """Send a repo's push events to whoever builds: Jenkins where there is one, else the git server itself.

    An earlier receiver's hook goes, or every push would be built twice; hooks that people made stay.

    Raises:
        NotFoundError: no such repo.
        ServiceError: the git server refused or did not answer.
    """
    from airloom.embedded.builder import HOOK_PATH, hook_url
    from airloom.hooks import jenkins

    def is_receiver(url: str) -> bool:
        return jenkins.is_hook_url(url) or urlsplit(url).path == HOOK_PATH

    settings = hooks.settings
    url = jenkins.hook_url(settings) if settings.jenkins_url else hook_url(settings)
    hooks.gitbucket.ensure_hook(repo, url, settings.secret("webhook_secret"), replaces=is_receiver)


def push_template(hooks: Hooks, repo: str, folder: Path) -> bool:
    """Push a folder as the first commit of an empty repo; False, and no change, when somebody has pushed already."""
    from airloom.hooks.git_command import git_environment, run_git

    if _has_main(hooks, repo):
        return False
    environment = git_environment({"user.name": "Airloom", "user.email": "airloom@localhost"})
    with tempfile.TemporaryDirectory(prefix="airloom-push-") as temporary:
        git_dir = Path(temporary) / "git"
        run_git(["init", "--quiet", "--bare", "-b", "main", str(git_dir)], environment=environment)
        (git_dir / "info" / "exclude").write_text("\n".join(EXCLUDED) + "\n")
        tree = ("-C", str(folder), "--work-tree", str(folder))
        run_git([*tree, "add", "--all", "."], git_dir=git_dir, environment=environment)
        run_git([*tree, "commit", "--quiet", "-m", TEMPLATE_MESSAGE], git_dir=git_dir, environment=environment)
        try:
            hooks.git.push(repo, git_dir, "refs/heads/main:refs/heads/main")
        except ServiceError:
            if _has_main(hooks, repo):  # somebody was faster, and theirs stays
                return False
            raise
    return True


def description(folder: Path) -> str:
    """The first sentence of a repo's README."""
    try:
        lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    text = next((line.strip() for line in lines if line.strip() and not line.startswith(("#", "<", "!"))), "")
    return text.split(". ")[0].rstrip(".:")[:200]


def _has_main(hooks: Hooks, repo: str) -> bool:
    try:
        hooks.git.head(repo)
    except NotFoundError:
        return False
    return True


def _airflow(hooks: Hooks, on_progress: OnProgress) -> None:
    on_progress("Airflow", "working")
    wanted, values = connections(hooks), variables(hooks.settings)
    for connection_id, connection in wanted.items():
        hooks.airflow.ensure_connection(connection_id, connection)
    hooks.airflow.ensure_pool(STAGE_POOL, hooks.settings.stage_slots, "Stages that run at once, of all pipelines")
    for key, (value, text) in values.items():
        hooks.airflow.ensure_variable(key, value, text)
    said = f"connections {', '.join(wanted)}; pool {STAGE_POOL}; variables {', '.join(values)}"
    on_progress("Airflow", f"done: {said}")


def _deployments(hooks: Hooks, on_progress: OnProgress) -> None:
    from airloom.flows.deployments import restore_routes

    on_progress("deployments", "working")
    restored, failed = restore_routes(hooks)
    said = f"done: {', '.join(restored) or 'none yet'}"
    on_progress("deployments", said + (f"; not restored: {'; '.join(failed)}" if failed else ""))


def variables(settings: Settings) -> dict[str, tuple[str, str]]:
    """Name -> value and description of what people's own DAGs need to know of this installation."""
    images = "/".join(part for part in (settings.registry, settings.image_namespace) if part)
    return {
        "airloom_images": (images, "What the names of images begin with: <this>/<repo>:<commit>"),
        "airloom_docker_network": (settings.docker_network, "The network that containers of stages and releases join"),
    }


def connections(hooks: Hooks) -> dict[str, dict[str, Any]]:
    """Airflow's connections to the other services, as its REST API takes them."""
    import json

    settings = hooks.settings
    mlflow = urlsplit(settings.mlflow_api_url)
    found: dict[str, dict[str, Any]] = {
        "airloom_s3": {
            "conn_type": "aws",
            "login": "airloom",
            "password": settings.secret("s3_airloom_secret"),
            "extra": json.dumps({"endpoint_url": settings.s3_endpoint_url, "region_name": settings.s3_region}),
            "description": "Object store",
        },
        "airloom_git": {
            "conn_type": "git",
            "host": settings.git_base_url,
            "login": settings.git_user,
            "password": settings.secret("git_password"),
            "description": "Git server of the stage repos",
        },
        "airloom_mlflow": {
            "conn_type": "http",
            "schema": mlflow.scheme,
            "host": mlflow.hostname,
            "port": mlflow.port,
            "description": "MLflow: runs and models",
        },
    }
    if settings.registry and settings.registry_user:
        host, _, port = settings.registry.rpartition(":")
        found[REGISTRY_CONNECTION] = {
            "conn_type": "docker",
            "host": host if port.isdigit() else settings.registry,
            "port": int(port) if port.isdigit() else None,
            "login": settings.registry_user,
            "password": settings.secret("registry_password"),
            "description": "Image registry",
        }
    return found
