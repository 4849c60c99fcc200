"""Receives push events and builds what was pushed.

The route stands in the git server's process, and takes what GitBucket would send: the event is not trusted before its
signature has been checked. What is built is the branch's tip, and whether it is built is decided from what was built
before: a lost, doubled, late or reordered event leads to the same.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from airloom.contract.push import PushDelivery
from airloom.embedded.delivery_log import DeliveryLog
from airloom.embedded.forge.repositories import ZERO, Repositories, Repository
from airloom.embedded.forge.state import State
from airloom.errors import NotFoundError
from airloom.flows.build import STATUS_CONTEXT
from airloom.flows.changes import Decision, decide_tip
from airloom.settings import Settings

log = logging.getLogger(__name__)

HOOK_PATH = "/-/hooks/push"
BRANCH = "main"
_BODY_BYTES = 8 * 1024 * 1024
_BUILD_SECONDS = 900.0
_GRACE_SECONDS = 5.0
_LOGS_KEPT = 50
_MESSAGE_CHARACTERS = 200
_DELIVERY_CHARACTERS = 200
_SHA = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _Event:
    """What is read of a push event."""

    repo: str
    ref: str
    after: str
    pusher: str
    message: str
    delivery: str
    received_at: datetime


def hook_url(settings: Settings) -> str:
    """Where the git server's hooks send push events of stage repos."""
    return f"{settings.git_base_url}{HOOK_PATH}"


def decide(repository: Repository, *, ref: str, after: str, known: Container[str]) -> Decision:
    """Whether a push calls for a build.

    Tags, deletions and other branches don't, nor does a tip that is as far as stages go what was built before it.

    Args:
        known: commits whose build has ended, well or badly, or is under way.
    """
    if not ref.startswith("refs/heads/"):
        return Decision(None, "a tag is not built")
    if after == ZERO:
        return Decision(None, "a deletion is not built")
    if ref != f"refs/heads/{BRANCH}":
        return Decision(None, f"only {BRANCH} is built")
    tip = repository.resolve(ref)
    if tip is None:
        return Decision(None, f"{BRANCH} is gone")
    return decide_tip(repository.path, tip, known)


def signature_problem(body: bytes, header: str | None, secret: str) -> str | None:
    """What is wrong with an event's `X-Hub-Signature-256`: `unsigned`, `forged`, or nothing."""
    if not header:
        return "unsigned"
    expected = "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return None if hmac.compare_digest(expected.encode(), header.encode("utf-8", "replace")) else "forged"


def build_log(settings: Settings, repo: str, commit: str) -> Path:
    """Where a build of the git server's writes."""
    return settings.log_dir / "builds" / f"{repo}-{commit[:12]}.log"


def build_log_url(settings: Settings, repo: str, commit: str) -> str:
    """The git server's page of it."""
    return f"{settings.git_page_url}/{settings.git_owner}/{repo}/builds/{commit}"


def build_command(repo: str, commit: str, pusher: str) -> list[str]:
    """`airloom build` with this Python, wherever the console script may be."""
    start = "import sys; from airloom.cli.main import main; sys.argv[0] = 'airloom'; main()"
    return [sys.executable, "-c", start, "build", f"{repo}@{commit}", "--once", "--pusher", pusher]


class Builder:
    """Runs `airloom build` for each commit that is asked for: one at a time for a repo, the newest wins.

    Args:
        on_event: called with `accepted`, `ignored`, `unsigned`, `forged` or `malformed`.
        on_build: called with `success` or `failure`.
        command: of the build of a repo's commit for a pusher.
    """

    def __init__(
        self,
        settings: Settings,
        repositories: Repositories,
        state: State,
        *,
        on_event: Callable[[str], None],
        on_build: Callable[[str], None],
        command: Callable[[str, str, str], list[str]] = build_command,
    ) -> None:
        self._settings = settings
        self._repositories = repositories
        self._state = state
        self._on_event = on_event
        self._on_build = on_build
        self._command = command
        self._secret = settings.secret("webhook_secret")
        self._lock = threading.Lock()
        self._workers: dict[str, threading.Thread] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped = threading.Event()
        self._log = DeliveryLog(state, self._bring)

    # Events

    async def endpoint(self, request: Request) -> Response:
        """`POST` of a push event, as GitBucket sends it."""
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _BODY_BYTES:
                return self._refuse("malformed", 413, f"an event holds at most {_BODY_BYTES} bytes")
        refusal = self._refusal(request, body)
        if refusal is not None:
            return refusal
        if request.headers.get("x-github-event") != "push":
            return self._ignored("only push events are built")
        try:
            event = json.loads(body)
            ref, after = str(event["ref"]), str(event["after"])
            owner, _, name = str(event["repository"]["full_name"]).partition("/")
            pusher = str(event["pusher"]["name"])
            head = event.get("head_commit") or {}
            message = str(head.get("message", "")).partition("\n")[0][:_MESSAGE_CHARACTERS]
        except (ValueError, KeyError, TypeError, AttributeError):
            return self._refuse("malformed", 400, "the event lacks ref, after, repository or pusher")
        if owner != self._settings.git_owner:
            return self._ignored(f"{owner} is not the owner of stage repos")
        delivery = request.headers.get("x-github-delivery") or f"unnamed-{uuid.uuid4()}"
        return await self._taken(
            _Event(
                repo=name,
                ref=ref,
                after=after,
                pusher=pusher,
                message=message,
                delivery=delivery[:_DELIVERY_CHARACTERS],
                received_at=datetime.now(UTC),
            )
        )

    def _refusal(self, request: Request, body: bytes) -> Response | None:
        problem = signature_problem(body, request.headers.get("x-hub-signature-256"), self._secret)
        if problem is not None:
            log.warning("an %s push event was refused", problem)
            return self._refuse(problem, 401, f"the event is {problem}")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return self._refuse("malformed", 415, "the event must be application/json")
        return None

    async def _taken(self, event: _Event) -> Response:
        import anyio.to_thread

        def take() -> Decision:
            repository = self._repositories.get(self._settings.git_owner, event.repo)
            decision = self.decide(repository, ref=event.ref, after=event.after)
            if decision.commit is not None:
                self.want(event.repo, decision.commit, event.pusher)
            self._note(event, decision)  # what is built counts for more than what is known of it
            return decision

        try:
            decision = await anyio.to_thread.run_sync(take)
        except NotFoundError as error:
            return self._refuse("malformed", 404, error.message)
        if decision.commit is None:
            return self._ignored(decision.reason)
        self._on_event("accepted")
        return JSONResponse({"build": f"{event.repo}@{decision.commit}", "reason": decision.reason}, status_code=202)

    def _note(self, event: _Event, decision: Decision) -> None:
        """Keep for the ledger what came of an event; the many of tags and deletions are not worth it."""
        if event.ref != f"refs/heads/{BRANCH}" or event.after == ZERO or not _SHA.fullmatch(event.after):
            return
        instead = f"; {BRANCH} is at {decision.commit[:8]} by now" if decision.commit not in {None, event.after} else ""
        self._log.note(
            PushDelivery(
                repo=event.repo,
                commit=event.after,
                id=event.delivery,
                at=event.received_at,
                ref=event.ref,
                pusher=event.pusher,
                message=event.message,
                outcome="ignored" if decision.commit is None else "build",
                reason=decision.reason + instead,
            )
        )

    def _bring(self, entry: PushDelivery) -> None:
        from airloom.flows.push_entry import write_entry
        from airloom.hooks.connect import Hooks

        write_entry(Hooks(self._settings), entry)

    def _refuse(self, outcome: str, status: int, message: str) -> Response:
        self._on_event(outcome)
        return JSONResponse({"message": message}, status_code=status)

    def _ignored(self, reason: str) -> Response:
        self._on_event("ignored")
        return JSONResponse({"ignored": reason})

    # Builds

    def decide(self, repository: Repository, *, ref: str, after: str) -> Decision:
        """Whether a push calls for a build, by what is known of earlier ones. It starts none."""
        known = self._state.built_commits(repository.full_name, STATUS_CONTEXT)
        wanted = self._state.wanted_build(repository.name)
        if wanted is not None:
            known.add(wanted["commit"])
        return decide(repository, ref=ref, after=after, known=known)

    def start(self) -> None:
        """Take up the builds that a stop or a kill interrupted."""
        self._log.start()
        for row in self._state.wanted_builds():
            self._ensure_worker(row["repo"])

    def want(self, repo: str, commit: str, pusher: str) -> None:
        """Build a commit as soon as the repo's running build has ended."""
        self._state.want_build(repo, commit, pusher)
        self._ensure_worker(repo)

    def stop(self) -> None:
        """End running builds; they are taken up at the next start."""
        self._stopped.set()
        self._log.stop()
        with self._lock:
            running = list(self._running.values())
            workers = list(self._workers.values())
        for process in running:
            _end(process)
        for worker in workers:
            worker.join(_GRACE_SECONDS)

    def _ensure_worker(self, repo: str) -> None:
        with self._lock:
            if repo not in self._workers and not self._stopped.is_set():
                worker = threading.Thread(target=self._work, args=(repo,), name=f"build-{repo}", daemon=True)
                self._workers[repo] = worker
                worker.start()

    def _work(self, repo: str) -> None:
        while True:
            with self._lock:
                wanted = self._state.wanted_build(repo)
                if wanted is None or self._stopped.is_set():
                    del self._workers[repo]
                    return
            try:
                code = self._build(repo, wanted["commit"], wanted["pusher"])
            except OSError as error:
                log.error("the build of %s@%s cannot be run: %s", repo, wanted["commit"][:12], error)
                code = -1
            if not self._stopped.is_set():
                if code != 0:
                    self._explain(repo, wanted["commit"], code)
                self._on_build("success" if code == 0 else "failure")
                self._state.build_ended(repo, wanted["commit"])

    def _build(self, repo: str, commit: str, pusher: str) -> int:
        what = f"{repo}@{commit[:12]}"
        path = build_log(self._settings, repo, commit)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as output:
            process = subprocess.Popen(
                self._command(repo, commit, pusher),
                env={**os.environ, "AIRLOOM_BUILD_URL": build_log_url(self._settings, repo, commit)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with self._lock:
            self._running[repo] = process
        log.info("the build of %s has started as process %d", what, process.pid)
        try:
            if self._stopped.is_set():
                _end(process)
            code = process.wait(_BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            log.error("the build of %s did not end within %.0f s", what, _BUILD_SECONDS)
            code = _end(process)
        finally:
            with self._lock:
                del self._running[repo]
        log.info("the build of %s ended with exit code %d, see %s", what, code, path)
        for old in sorted(path.parent.glob("*.log"), key=lambda found: found.stat().st_mtime)[:-_LOGS_KEPT]:
            old.unlink(missing_ok=True)
        return code

    def _explain(self, repo: str, commit: str, code: int) -> None:
        """Say on the commit that its build died, where it could not say so itself."""
        full_name = f"{self._settings.git_owner}/{repo}"
        rows = [row for row in self._state.statuses(full_name, commit) if row["context"] == STATUS_CONTEXT]
        if not rows or rows[0]["state"] == "pending":
            self._state.set_status(
                full_name,
                commit,
                context=STATUS_CONTEXT,
                state="error",
                target_url=build_log_url(self._settings, repo, commit),
                description=f"the build ended with exit code {code}; see logs/builds/{repo}-{commit[:12]}.log",
                creator=self._settings.git_user,
            )


def _end(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM to the build's group, SIGKILL after the grace."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_GRACE_SECONDS)
    return process.wait()
