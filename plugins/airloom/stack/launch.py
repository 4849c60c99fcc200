"""Brings the stack up in order, provisions it, and takes it down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from airloom.errors import ConfigError
from airloom.settings import Settings
from airloom.stack import jenkins
from airloom.stack.compose import GROUPS, Compose
from airloom.stack.databases import OWN_DATABASE
from airloom.stack.doctor import check_machine

if TYPE_CHECKING:
    from airloom.flows.gc import Freed

JENKINS_URL = "http://jenkins:8080"
BEFORE_AIRFLOW = "--before-airflow"

OnProgress = Callable[[str, str], None]


def bring_up(settings: Settings, on_progress: OnProgress, *, seed: bool = True) -> None:
    """Check the machine, start group after group, each until it is healthy, and provision. Runs again without harm.

    Args:
        seed: whether to write the demo's raw data.

    Raises:
        ConfigError: the machine lacks something, or another installation has a stack of this name; nothing was started.
        PlatformError: a service does not start, or provisioning failed; what runs goes on.
    """
    failed = [check for check in check_machine(settings) if not check.ok]
    if failed:
        lines = "\n".join(f"{c.name}: found {c.found}, needed {c.needed}; {c.advice}" for c in failed)
        raise ConfigError(f"the stack cannot start here:\n{lines}", hint="see all checks with: airloom doctor")
    _claim(settings)
    compose = Compose(settings)
    jobs_changed = jenkins.ensure_listed(settings, jenkins.template_repos(settings.project))
    for group in GROUPS:
        if group == "airflow":
            # By now the stack's own registry answers, if that is where images go.
            _runtimes(settings, on_progress)
            _provision(compose, on_progress, BEFORE_AIRFLOW)
            _dags(settings, on_progress)
        on_progress(group, "working")
        compose.start(group)
        on_progress(group, f"done: {len(compose.config([group])['services'])} services")
        if group == "devops" and jobs_changed:
            _reload_jenkins(compose)
    _provision(compose, on_progress, *_unless(seed))
    _write_stack_file(settings)


def provision(settings: Settings, on_progress: OnProgress, *, seed: bool = True) -> None:
    """Make what a running stack lacks.

    Args:
        seed: whether to write the demo's raw data.

    Raises:
        PlatformError: provisioning failed; its last lines.
    """
    _provision(Compose(settings), on_progress, *_unless(seed))


def _unless(seed: bool) -> tuple[str, ...]:
    return () if seed else ("--no-seed",)


def collect_inside(settings: Settings, *, keep_days: float, dry_run: bool) -> Freed:
    """What `airloom.flows.gc.collect` does, inside, where the workspaces are.

    Raises:
        PlatformError: it failed; its last lines.
    """
    from airloom.flows.gc import Freed

    said = _inside(Compose(settings), "gc", str(keep_days), *(("--dry-run",) if dry_run else ()))
    return Freed.model_validate_json(said.strip().splitlines()[-1])


def _provision(compose: Compose, on_progress: OnProgress, *arguments: str) -> None:
    step = "git server" if BEFORE_AIRFLOW in arguments else "provisioning"
    on_progress(step, "working")

    def show(line: str) -> None:
        name, separator, state = line.partition(": ")
        if separator:
            on_progress(name, state)

    _inside(compose, "provision", *arguments, on_line=show)
    on_progress(step, "done")


def _dags(settings: Settings, on_progress: OnProgress) -> None:
    """From here, where dags/ may have changed since the platform's image was built."""
    from airloom.hooks.connect import Hooks
    from airloom.stack.dags import push_dags

    on_progress("DAGs", "working")
    on_progress("DAGs", f"done: {push_dags(Hooks(settings), settings.project / 'dags')}")


def bring_down(settings: Settings, *, volumes: bool = False) -> bool:
    """Stop and remove containers and networks; volumes, which hold all data, only when asked. False: nothing was there.

    Raises:
        PlatformError: Compose failed.
    """
    from airloom.hooks.docker_engine import connect, engine_errors

    compose = Compose(settings)
    there = bool(compose.states())
    settings.stack_file.unlink(missing_ok=True)
    _end_own_containers(settings)
    # Every profile, so that nothing stays of one that has been switched off since.
    compose.run("--profile", "*", "down", "--remove-orphans", *(("--volumes",) if volumes else ()))
    if volumes:
        with engine_errors():
            api = connect(settings)
            for name in volumes_of(settings):  # the journals of releases, which are no volumes of the compose files
                api.remove_volume(name)
    return there


def add_repo(settings: Settings, name: str) -> None:
    """Make an empty stage repo in a running stack.

    Raises:
        PlatformError: that is no name for one, or the git server refused.
        ServiceError: Jenkins refused or did not answer; add it once more.
    """
    compose = Compose(settings)
    _inside(compose, "add-repo", name)
    if jenkins.ensure_listed(settings, [name]):
        _reload_jenkins(compose)


def _reload_jenkins(compose: Compose) -> None:
    """Have Jenkins, where there is one, make the jobs of the list."""
    from airloom.hooks.jenkins import reload

    if "jenkins" in compose.config()["services"]:
        reload(compose.settings, f"http://{compose.published('jenkins', 8080)}")
        jenkins.note_read(compose.settings)


def _inside(compose: Compose, *arguments: str, on_line: Callable[[str], None] | None = None) -> str:
    """Run a command of the platform's container in the stack's network; what it says, each line handed on at once."""
    # Where there is Jenkins it builds, and push events go there.
    known = ("--env", f"AIRLOOM_JENKINS_URL={JENKINS_URL}") if "jenkins" in compose.config()["services"] else ()
    return compose.run("run", "--rm", "--no-deps", "--quiet-pull", *known, "provision", *arguments, on_line=on_line)


def _runtimes(settings: Settings, on_progress: OnProgress) -> None:
    """What stage images are built from, made here: the stack's own containers have no private wheels or authorities."""
    from airloom.flows.images import RUNTIMES, ensure_runtime

    on_progress("runtimes", "working")
    for runtime in RUNTIMES:
        ensure_runtime(settings, runtime, lambda line: on_progress("runtimes", line[:60]), pushed=True)
    on_progress("runtimes", f"done: {', '.join(RUNTIMES)}")


def _write_stack_file(settings: Settings) -> None:
    """Let this machine's commands speak with the stack."""
    port = Compose(settings).published("mysql", 3306)
    lines = {
        "AIRLOOM_RUNNER": "docker",
        "AIRLOOM_DEPLOY_TARGET": "docker",
        "AIRLOOM_INSTANCE": settings.stack,
        "AIRLOOM_DATABASE_URL": f"mysql+pymysql://airloom@{port}/{OWN_DATABASE}",
    }
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    settings.stack_file.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))


def _end_own_containers(settings: Settings) -> None:
    """Stages and releases are no services of the compose files, but stand in their network."""
    from airloom.hooks.docker_container import INSTANCE_LABEL
    from airloom.hooks.docker_engine import connect, engine_errors
    from airloom.hooks.docker_runner import WORKSPACE_LABEL

    with engine_errors():
        api = connect(settings)
        label = f"{INSTANCE_LABEL}={settings.stack}"
        for container in api.containers(all=True, filters={"label": label}):
            api.stop(container["Id"], timeout=40)
            api.remove_container(container["Id"], force=True)
        for volume in api.volumes(filters={"label": [label, WORKSPACE_LABEL]})["Volumes"] or []:
            api.remove_volume(volume["Name"])


def volumes_of(settings: Settings) -> list[str]:
    """The names of the volumes that hold the stack's data.

    Raises:
        UnavailableError: the engine does not answer.
    """
    from airloom.hooks.docker_container import INSTANCE_LABEL
    from airloom.hooks.docker_engine import connect, engine_errors

    with engine_errors():
        api = connect(settings)
        names = {
            volume["Name"]
            for label in (f"com.docker.compose.project={settings.stack}", f"{INSTANCE_LABEL}={settings.stack}")
            for volume in api.volumes(filters={"label": label})["Volumes"] or []
        }
    return sorted(names)


def is_own(settings: Settings) -> bool:
    """Whether the stack of this name is this installation's: the engine has one of each name, whoever made it."""
    record = _record(settings)
    return record.exists() and record.read_text(encoding="utf-8").strip() == settings.stack


def _record(settings: Settings) -> Path:
    """Says that this installation has made a stack, and its name; goes with the stack's volumes."""
    return settings.home_dir / "stack"


def _claim(settings: Settings) -> None:
    if is_own(settings):
        return
    volumes = volumes_of(settings)
    if volumes:
        raise ConfigError(
            f"the engine has a stack {settings.stack!r} that is not this installation's: {', '.join(volumes)}",
            hint="give this one another name, AIRLOOM_STACK in .env.local; if that one is this installation's after "
            f"all, write its name into {_record(settings)}",
        )
    settings.home_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    _record(settings).write_text(f"{settings.stack}\n", encoding="utf-8")


def is_up(settings: Settings) -> bool:
    """Whether a container of its stack runs; False as well where there is no Compose or no engine."""
    from airloom.errors import AirloomError

    if not is_own(settings):
        return False
    try:
        return Compose(settings).is_up()
    except AirloomError:
        return False
