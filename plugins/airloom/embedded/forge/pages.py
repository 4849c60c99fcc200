"""Small pages for people, at GitBucket's addresses."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio.to_thread
import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from airloom.embedded.forge.repositories import Repositories, Repository
from airloom.embedded.forge.state import State
from airloom.errors import NotFoundError

_COMMITS_SHOWN = 30
_TAGS_SHOWN = 100
_LOG_BYTES = 256 * 1024
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


class Pages:
    """Handlers and their routes; everything that comes from a repository is escaped."""

    def __init__(self, repositories: Repositories, state: State, build_log: Callable[[str, str], Path]) -> None:
        self._repositories = repositories
        self._state = state
        self._build_log = build_log
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        self._templates.filters["part"] = lambda text: quote(str(text), safe="/")
        self._templates.filters["time"] = lambda value: value.strftime("%Y-%m-%d %H:%M:%S %z")

    def routes(self) -> list[Route]:
        """All routes; they are the last ones, because they take any owner's name."""
        pages: list[tuple[str, Callable[[Request], str]]] = [
            ("/", self._index),
            ("/{owner}/{repo}", self._repository),
            ("/{owner}/{repo}/commit/{sha}", self._commit),
            ("/{owner}/{repo}/builds/{sha}", self._build),
            ("/{owner}/{repo}/commits/{ref:path}", self._commits),
            ("/{owner}/{repo}/tree/{tag:path}", self._tree),
            ("/{owner}/{repo}/releases", self._releases),
            ("/{owner}/{repo}/releases/{tag:path}", self._tree),
        ]
        return [Route(path, self._answering(handler), methods=["GET"]) for path, handler in pages]

    def _answering(self, handler: Callable[[Request], str]) -> Callable[[Request], Awaitable[Response]]:
        @functools.wraps(handler)
        async def answer(request: Request) -> Response:
            try:
                return HTMLResponse(await anyio.to_thread.run_sync(handler, request), headers=_HEADERS)
            except NotFoundError as error:
                page = self._render("missing.html", title="Not found", message=error.message)
                return HTMLResponse(page, status_code=404, headers=_HEADERS)

        return answer

    def _render(self, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(**values)

    def _found(self, request: Request) -> Repository:
        return self._repositories.get(request.path_params["owner"], request.path_params["repo"])

    def _index(self, request: Request) -> str:
        rows = []
        for repository in self._repositories.all():
            head = repository.commits("refs/heads/main", limit=1)
            rows.append((repository, head[0] if head else None, repository.description()))
        return self._render("index.html", title="Repositories", rows=rows)

    def _repository(self, request: Request) -> str:
        repository = self._found(request)
        return self._render(
            "repository.html",
            title=repository.full_name,
            repository=repository,
            description=repository.description(),
            branches=sorted(repository.branches().items()),
            commits=self._with_statuses(repository, "refs/heads/main"),
            tags=repository.tags(limit=_TAGS_SHOWN),
            deliveries=self._state.deliveries(repository.full_name, limit=20),
        )

    def _commits(self, request: Request) -> str:
        repository = self._found(request)
        sha = self._sha(repository, request.path_params["ref"])
        return self._render(
            "commits.html",
            title=f"{repository.full_name}: {request.path_params['ref']}",
            repository=repository,
            commits=self._with_statuses(repository, sha),
        )

    def _commit(self, request: Request) -> str:
        repository = self._found(request)
        sha = self._sha(repository, request.path_params["sha"])
        commit = repository.commits(sha, limit=1)[0]
        return self._render(
            "commit.html",
            title=f"{repository.full_name}@{sha[:8]}",
            repository=repository,
            commit=commit,
            statuses=self._state.statuses(repository.full_name, sha),
            tags=[tag for tag in repository.tags(limit=_TAGS_SHOWN) if tag.commit == sha],
        )

    def _build(self, request: Request) -> str:
        repository = self._found(request)
        sha = self._sha(repository, request.path_params["sha"])
        try:
            with self._build_log(repository.name, sha).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
                log = file.read().decode(errors="replace")
        except FileNotFoundError:
            raise NotFoundError(f"there is no log of a build of {repository.full_name}@{sha[:8]}") from None
        return self._render(
            "build.html", title=f"Build of {repository.full_name}@{sha[:8]}", repository=repository, sha=sha, log=log
        )

    def _tree(self, request: Request) -> str:
        repository = self._found(request)
        name = request.path_params["tag"]
        tags = repository.tags(name)
        sha = tags[0].commit if tags else self._sha(repository, name)
        tag = tags[0] if tags else None
        facts = _facts(tag.message) if tag else []
        return self._render(
            "tree.html",
            title=f"{repository.full_name}: {name}",
            repository=repository,
            name=name,
            tag=tag,
            sha=sha,
            facts=facts,
            release=self._state.release(repository.full_name, name),
            statuses=self._state.statuses(repository.full_name, sha),
            files=[
                line
                for line in repository.git("ls-tree", "--name-only", "-r", "-z", sha)
                .decode(errors="replace")
                .split("\0")
                if line
            ],
        )

    def _releases(self, request: Request) -> str:
        repository = self._found(request)
        return self._render(
            "releases.html",
            title=f"{repository.full_name}: releases",
            repository=repository,
            releases=self._state.releases(repository.full_name),
            tags=repository.tags(limit=_TAGS_SHOWN),
        )

    def _sha(self, repository: Repository, ref: str) -> str:
        sha = repository.resolve(ref)
        if sha is None:
            raise NotFoundError(f"{repository.full_name} has no {ref!r}")
        return sha

    def _with_statuses(self, repository: Repository, ref: str) -> list[tuple[Any, list[Any]]]:
        found = repository.commits(ref, limit=_COMMITS_SHOWN)
        return [(commit, self._state.statuses(repository.full_name, commit.id)) for commit in found]


def _facts(message: str) -> list[tuple[str, str]]:
    """A tag's JSON message as rows, inner objects by dotted names; none when it is no JSON object."""
    try:
        value = json.loads(message)
    except ValueError:
        return []
    rows: list[tuple[str, str]] = []

    def add(prefix: str, part: Any) -> None:
        if isinstance(part, dict):
            for key, inner in part.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            rows.append((prefix, part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)))

    if isinstance(value, dict):
        add("", value)
    return rows
