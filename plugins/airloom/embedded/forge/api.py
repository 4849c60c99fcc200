"""The part of GitBucket's `/api/v3` that Airloom uses, answer for answer.

Where GitBucket answers oddly (an existing repository gives 200 and a message, an unknown repository 404), so
does this.
"""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from airloom.embedded.forge.repositories import Repositories, Repository
from airloom.embedded.forge.shapes import Shapes
from airloom.embedded.forge.state import State
from airloom.errors import NotFoundError

STATES = frozenset({"pending", "success", "error", "failure"})
EVENTS = frozenset({"push"})
_BODY_BYTES = 1024 * 1024
_URL = re.compile(r"https?://\S+")

Call = tuple[Request, dict[str, Any]]


class BadRequestError(Exception):
    """What the client sent cannot be used; the message says why."""


class Api:
    """Handlers and their routes."""

    def __init__(self, repositories: Repositories, state: State, shapes: Shapes) -> None:
        self._repositories = repositories
        self._state = state
        self._shapes = shapes

    def routes(self) -> list[Route]:
        """All routes, below `/api/v3`."""
        repo = "/api/v3/repos/{owner}/{repo}"
        return [
            self._route("GET", "/api/v3/user", self._user),
            self._route("GET", "/api/v3/user/repos", self._list_repositories),
            self._route("POST", "/api/v3/user/repos", self._create_repository),
            self._route("GET", "/api/v3/repositories", self._list_repositories),
            self._route("GET", "/api/v3/users/{owner}/repos", self._list_repositories),
            self._route("GET", "/api/v3/orgs/{owner}/repos", self._list_repositories),
            self._route("POST", "/api/v3/orgs/{owner}/repos", self._create_repository),
            self._route("GET", repo, self._get_repository),
            self._route("GET", f"{repo}/hooks", self._list_hooks),
            self._route("POST", f"{repo}/hooks", self._create_hook),
            self._route("GET", f"{repo}/hooks/{{id:int}}", self._get_hook),
            self._route("PATCH", f"{repo}/hooks/{{id:int}}", self._change_hook),
            self._route("DELETE", f"{repo}/hooks/{{id:int}}", self._remove_hook),
            self._route("POST", f"{repo}/statuses/{{sha:path}}", self._set_status),
            self._route("GET", f"{repo}/statuses/{{ref:path}}", self._list_statuses),
            self._route("GET", f"{repo}/commits/{{ref:path}}/statuses", self._list_statuses),
            self._route("GET", f"{repo}/commits/{{ref:path}}/status", self._combined_status),
            self._route("GET", f"{repo}/commits/{{ref:path}}", self._get_commit),
            self._route("GET", f"{repo}/commits", self._list_commits),
            self._route("GET", f"{repo}/branches", self._list_branches),
            self._route("GET", f"{repo}/tags", self._list_tags),
            self._route("GET", f"{repo}/releases", self._list_releases),
            self._route("POST", f"{repo}/releases", self._create_release),
            self._route("GET", f"{repo}/releases/tags/{{tag:path}}", self._get_release),
            self._route("PATCH", f"{repo}/releases/{{tag:path}}", self._change_release),
        ]

    def _route(self, method: str, path: str, handler: Callable[[Request, Any], Response]) -> Route:
        return Route(path, _answering(handler), methods=[method])

    def _repository(self, request: Request) -> Repository:
        return self._repositories.get(request.path_params["owner"], request.path_params["repo"])

    def _sha(self, repository: Repository, ref: str) -> str:
        sha = repository.resolve(ref)
        if sha is None:
            raise NotFoundError(f"{repository.full_name} has no commit {ref!r}")
        return sha

    # Users and repositories

    def _user(self, request: Request, _: Any) -> Response:
        return JSONResponse(self._shapes.user(request.scope["user_name"]))

    def _list_repositories(self, request: Request, _: Any) -> Response:
        owner = request.path_params.get("owner")
        if request.url.path == "/api/v3/user/repos":
            owner = request.scope["user_name"]
        found = [repo for repo in self._repositories.all() if owner is None or repo.owner == owner]
        return JSONResponse([self._shapes.repository(repo) for repo in found])

    def _create_repository(self, request: Request, body: Any) -> Response:
        owner = request.path_params.get("owner") or request.scope["user_name"]
        name = _text(body, "name")
        try:
            self._repositories.get(owner, name)
        except NotFoundError:
            pass
        else:
            return JSONResponse(
                {
                    "message": "A repository with this name already exists on this account",
                    "documentation_url": "https://developer.github.com/v3/repos/#create",
                }
            )
        try:
            made = self._repositories.create(owner, name, str(body.get("description") or ""))
        except ValueError as error:
            raise BadRequestError(str(error)) from error
        return JSONResponse(self._shapes.repository(made))

    def _get_repository(self, request: Request, _: Any) -> Response:
        return JSONResponse(self._shapes.repository(self._repository(request)))

    # Hooks

    def _list_hooks(self, request: Request, _: Any) -> Response:
        repository = self._repository(request)
        return JSONResponse([self._shapes.hook(row) for row in self._state.hooks(repository.full_name)])

    def _create_hook(self, request: Request, body: Any) -> Response:
        repository = self._repository(request)
        try:
            row = self._state.add_hook(repository.full_name, **_hook_values(body))
        except sqlite3.IntegrityError:
            # GitBucket's database throws here too.
            return JSONResponse({"message": "the repository has a hook with this URL"}, status_code=500)
        return JSONResponse(self._shapes.hook(row))

    def _get_hook(self, request: Request, _: Any) -> Response:
        row = self._state.hook(self._repository(request).full_name, request.path_params["id"])
        if row is None:
            raise NotFoundError("no such hook")
        return JSONResponse(self._shapes.hook(row))

    def _change_hook(self, request: Request, body: Any) -> Response:
        self._get_hook(request, None)
        row = self._state.change_hook(request.path_params["id"], **_hook_values(body))
        if row is None:
            raise NotFoundError("no such hook")
        return JSONResponse(self._shapes.hook(row))

    def _remove_hook(self, request: Request, _: Any) -> Response:
        self._get_hook(request, None)
        self._state.remove_hook(request.path_params["id"])
        return Response(status_code=204)

    # Statuses and commits

    def _set_status(self, request: Request, body: Any) -> Response:
        repository = self._repository(request)
        sha = self._sha(repository, request.path_params["sha"])
        state, url = _text(body, "state"), body.get("target_url")
        context, description = str(body.get("context") or "default"), body.get("description")
        if state not in STATES:
            raise NotFoundError(f"state {state!r} is none of {', '.join(sorted(STATES))}")
        if url is not None and not (_URL.fullmatch(str(url)) and len(str(url)) < 255):
            raise NotFoundError("target_url is no http address below 255 characters")
        if len(context) >= 255 or (description is not None and len(str(description)) >= 1000):
            raise NotFoundError("context or description is too long")
        row = self._state.set_status(
            repository.full_name,
            sha,
            context=context,
            state=state,
            target_url=url,
            description=description,
            creator=request.scope["user_name"],
        )
        return JSONResponse(self._shapes.status(row))

    def _list_statuses(self, request: Request, _: Any) -> Response:
        repository = self._repository(request)
        sha = self._sha(repository, request.path_params["ref"])
        return JSONResponse([self._shapes.status(row) for row in self._state.statuses(repository.full_name, sha)])

    def _combined_status(self, request: Request, _: Any) -> Response:
        repository = self._repository(request)
        sha = self._sha(repository, request.path_params["ref"])
        rows = self._state.statuses(repository.full_name, sha)
        return JSONResponse(self._shapes.combined_status(repository, sha, rows))

    def _get_commit(self, request: Request, _: Any) -> Response:
        repository = self._repository(request)
        found = repository.commits(self._sha(repository, request.path_params["ref"]), limit=1)
        return JSONResponse(self._shapes.commit(repository, found[0]))

    def _list_commits(self, request: Request, _: Any) -> Response:
        repository = self._repository(request)
        start = repository.resolve(request.query_params.get("sha", "main"))
        found = repository.commits(start, limit=30) if start else []
        return JSONResponse([self._shapes.commit(repository, commit) for commit in found])

    def _list_branches(self, request: Request, _: Any) -> Response:
        branches = self._repository(request).branches()
        return JSONResponse([{"name": name, "commit": {"sha": sha}} for name, sha in sorted(branches.items())])

    # Tags and releases

    def _list_tags(self, request: Request, _: Any) -> Response:
        repository = self._repository(request)
        return JSONResponse([self._shapes.tag(repository, tag) for tag in repository.tags()])

    def _list_releases(self, request: Request, _: Any) -> Response:
        rows = self._state.releases(self._repository(request).full_name)
        return JSONResponse([self._shapes.release(row) for row in rows])

    def _get_release(self, request: Request, _: Any) -> Response:
        tag = request.path_params["tag"]
        row = self._state.release(self._repository(request).full_name, tag)
        if row is None:
            raise NotFoundError(f"no release of the tag {tag!r}")
        return JSONResponse(self._shapes.release(row))

    def _create_release(self, request: Request, body: Any) -> Response:
        return self._write_release(request, body, _text(body, "tag_name"))

    def _change_release(self, request: Request, body: Any) -> Response:
        tag = request.path_params["tag"]
        if self._state.release(self._repository(request).full_name, tag) is None:
            raise NotFoundError(f"no release of the tag {tag!r}")
        return self._write_release(request, body, tag)

    def _write_release(self, request: Request, body: Any, tag: str) -> Response:
        repository = self._repository(request)
        if not repository.tags(tag):
            raise BadRequestError(f"{repository.full_name} has no tag {tag!r}")
        row = self._state.set_release(
            repository.full_name,
            tag,
            name=str(body.get("name") or tag),
            body=body.get("body"),
            author=request.scope["user_name"],
        )
        return JSONResponse(self._shapes.release(row))


def _answering(handler: Callable[[Request, Any], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Read the body, run the handler in a thread, and give errors GitBucket's form."""

    @functools.wraps(handler)
    async def answer(request: Request) -> Response:
        body: Any = None
        if request.method in {"POST", "PATCH"}:
            # A page of another site can make a browser send a form, not JSON.
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return JSONResponse({"message": "the body must be application/json"}, status_code=415)
            try:
                body = await request.json() if int(request.headers.get("content-length", "0")) < _BODY_BYTES else None
            except ValueError:
                body = None
            if not isinstance(body, dict):
                return JSONResponse({"message": "the body must be a JSON object below 1 MiB"}, status_code=400)
        try:
            return await anyio.to_thread.run_sync(handler, request, body)
        except NotFoundError as error:
            return JSONResponse({"message": error.message}, status_code=404)
        except BadRequestError as error:
            return JSONResponse({"message": str(error)}, status_code=400)

    return answer


def _text(body: Any, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise BadRequestError(f"{name!r} must be a text, found {value!r}")
    return value


def _hook_values(body: Any) -> dict[str, Any]:
    config = body.get("config")
    if not isinstance(config, dict):
        raise BadRequestError("'config' is missing")
    url = _text(config, "url")
    kind = config.get("content_type", "form")
    events = body.get("events", ["push"])
    if kind not in {"form", "json"} or not _URL.fullmatch(url):
        raise NotFoundError(f"no hook for {kind!r} at {url!r}")
    if not isinstance(events, list) or not set(events) <= EVENTS:
        raise BadRequestError(f"events must be a list of {sorted(EVENTS)}, found {events!r}")
    return {"url": url, "content_type": kind, "secret": config.get("secret"), "events": ",".join(events)}
