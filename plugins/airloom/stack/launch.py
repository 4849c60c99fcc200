"""Brings the stack up in order, provisions it, and takes it down."""

from __future__ import annotations

from collections.abc import Callable

from airloom.errors import ConfigError
from airloom.settings import Settings
from airloom.stack.compose import GROUPS, Compose
from airloom.stack.databases import OWN_DATABASE
from airloom.stack.doctor import check_machine

JENKINS_URL = "http://jenkins:8080"

OnProgress = Callable[[str, str], None]


def bring_up(settings: Settings, on_progress: OnProgress) -> None:
    """Check the machine, start group after group, each until it is healthy, and provision. Runs again without harm.

    Raises:
        ConfigError: the machine lacks something; nothing was started.
        PlatformError: a service does not start, or provisioning failed; what runs goes on.
    """
    failed = [check for check in check_machine(settings) if not check.ok]
    if failed:
        lines = "\n".join(f"{c.name}: found {c.found}, needed {c.needed}; {c.advice}" for c in failed)
        raise ConfigError(f"the stack cannot start here:\n{lines}", hint="see all checks with: airloom doctor")
    compose = Compose(settings)
    _runtimes(settings, on_progress)
    for group in GROUPS:
        if group == "airflow":
            _provision(compose, on_progress, "--before-airflow")
        on_progress(group, "working")
        compose.start(group)
        on_progress(group, f"done: {len(compose.config([group])['services'])} services")
    _provision(compose, on_progress)
    _write_stack_file(settings)


def provision(settings: Settings, on_progress: OnProgress) -> None:
    """Make what a running stack lacks.

    Raises:
        PlatformError: provisioning failed; its last lines.
    """
    _provision(Compose(settings), on_progress)


def _provision(compose: Compose, on_progress: OnProgress, *arguments: str) -> None:
    step = "git users and DAGs" if arguments else "provisioning"
    on_progress(step, "working")
    said = _inside(compose, "provision", *arguments)
    for line in said.splitlines():
        name, separator, state = line.partition(": ")
        if separator:
            on_progress(name, state)
    on_progress(step, "done")


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
    """
    _inside(Compose(settings), "add-repo", name)


def _inside(compose: Compose, *arguments: str) -> str:
    """What a command of the platform's container says that runs in the stack's network."""
    # Where there is Jenkins it builds, and push events go there.
    jenkins = ("--env", f"AIRLOOM_JENKINS_URL={JENKINS_URL}") if "jenkins" in compose.config()["services"] else ()
    return compose.run("run", "--rm", "--no-deps", "--quiet-pull", *jenkins, "provision", *arguments)


def _runtimes(settings: Settings, on_progress: OnProgress) -> None:
    """What stage images are built from, made here: the stack's own containers have no private wheels or authorities."""
    from airloom.flows.images import RUNTIMES, ensure_runtime

    on_progress("runtimes", "working")
    for runtime in RUNTIMES:
        ensure_runtime(settings, runtime, lambda line: on_progress("runtimes", line[:60]))
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
    from airloom.hooks.docker_engine import connect, engine_errors
    from airloom.hooks.docker_runner import INSTANCE_LABEL, WORKSPACE_LABEL

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
    from airloom.hooks.docker_engine import connect, engine_errors
    from airloom.hooks.docker_runner import INSTANCE_LABEL

    with engine_errors():
        api = connect(settings)
        names = {
            volume["Name"]
            for label in (f"com.docker.compose.project={settings.stack}", f"{INSTANCE_LABEL}={settings.stack}")
            for volume in api.volumes(filters={"label": label})["Volumes"] or []
        }
    return sorted(names)


def is_up(settings: Settings) -> bool:
    """Whether a container of the stack runs; False as well where there is no Compose or no engine."""
    from airloom.errors import AirloomError

    try:
        return Compose(settings).is_up()
    except AirloomError:
        return False
