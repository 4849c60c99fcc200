"""Tell Airflow of a build, once for each commit: an asset event, which starts the pipelines that use the repo."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from airloom.contract.assets import stage_asset
from airloom.contract.build import BuildRecord, Telling
from airloom.errors import AirloomError, NotFoundError, UnavailableError
from airloom.hooks.connect import Hooks
from airloom.spec.load import load_pipelines

_SECONDS = 60.0
# The clocks of the machine that builds and of Airflow's may differ by less than this.
_CLOCKS_DIFFER = timedelta(days=1)
_EVENTS_AT_MOST = 1000
_MAIN = "refs/heads/main"
# A later commit that was told of long after this one is not looked for.
_NEWER_AT_MOST = 50

Progress = Callable[[str], None]


def announce(hooks: Hooks, record: BuildRecord, on_progress: Progress, *, of_main: bool) -> tuple[Telling, str]:
    """What came of telling, and what to say of it.

    Airflow is asked before it is told: an earlier call may have had its effect although its answer was lost, or the
    process that made it was killed.

    Args:
        of_main: whether to leave a commit alone when a later one of `main` has been told of, or when it left `main`.
    """
    import tenacity

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(UnavailableError),
        stop=tenacity.stop_after_delay(_SECONDS),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=10),
        reraise=True,
    )
    try:
        newer = _newer(hooks, record) if of_main else None
        if newer is not None:
            on_progress(newer)
            return "superseded", newer
        attempts(_tell, hooks, record)
    except NotFoundError:
        users = users_of(hooks, record.repo)
        if users:
            detail = f"Airflow has not read {', '.join(users)} yet: told when it has"
            on_progress(detail)
            return "due", detail
        detail = "no pipeline uses this repo, so that none was started"
        on_progress(detail)
        return "no pipeline", detail
    except AirloomError as error:
        detail = f"Airflow could not be told: {error.message}"
        on_progress(f"{detail}\n  -> the reconciler tries again; or run this build again when Airflow answers")
        return "due", detail
    on_progress("Airflow has been told: the pipelines that use this repo start")
    return "told", "Airflow has been told"


def users_of(hooks: Hooks, repo: str) -> list[str]:
    """The pipelines that use a repo, by the configurations that this process knows: Airflow may not have them yet."""
    specs, _ = load_pipelines(hooks.settings.configs_dir)
    return sorted(spec.name for spec in specs if repo in spec.repos)


def is_known(hooks: Hooks, repo: str) -> bool:
    """Whether Airflow has read a pipeline that uses a repo, so that it can be told.

    Raises:
        ServiceError: Airflow refused or did not answer.
    """
    try:
        hooks.airflow.asset_events(stage_asset(repo), limit=1)
    except NotFoundError:
        return False
    return True


def _tell(hooks: Hooks, record: BuildRecord) -> None:
    asset = stage_asset(record.repo)
    since = record.built_at - _CLOCKS_DIFFER
    events = hooks.airflow.asset_events(asset, since=since, limit=_EVENTS_AT_MOST)
    if any((event.get("extra") or {}).get("commit") == record.commit for event in events):
        return
    extra = {
        "repo": record.repo,
        "commit": record.commit,
        "pusher": record.pusher or record.author,
        "message": record.message,
    }
    hooks.airflow.create_asset_event(asset, extra)


def _newer(hooks: Hooks, record: BuildRecord) -> str | None:
    """Why a commit is not the one to start with: `main` has gone on, and Airflow knows."""
    from airloom.flows.build import find_build
    from airloom.hooks.git_history import history

    try:
        if hooks.git.head(record.repo) == record.commit:
            return None
        commits = history(hooks.git.mirror(record.repo), _MAIN)
    except NotFoundError:
        commits = []
    if record.commit not in commits:
        return "main no longer holds this commit, so that it starts nothing"
    for commit in commits[: commits.index(record.commit)][:_NEWER_AT_MOST]:
        later = find_build(hooks, record.repo, commit)
        if later is not None and later.announced:
            return f"the later commit {commit[:8]} has started the pipelines, so that this one does not"
    return None
