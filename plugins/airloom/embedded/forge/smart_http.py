"""git's smart HTTP protocol, by git's own `http-backend`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from airloom.embedded.forge.repositories import Repositories, Repository
from airloom.errors import NotFoundError
from airloom.hooks.git_command import git_environment

log = logging.getLogger(__name__)

SERVICES = frozenset({"git-upload-pack", "git-receive-pack"})
_CHUNK_BYTES = 64 * 1024
_HEADER_BYTES = 16 * 1024
_READERS = 8
_LIMIT_SECONDS = 900.0

# Where many pushes end there are many small objects; git's own limits decide whether packing is worth it.
_PACK_EVERY = 200


class SmartHttp:
    """Fetches run side by side; pushes to one repository run one after the other.

    A request's body is received whole before git starts: a slow or broken client holds nobody up.

    Args:
        bodies: a folder for the bodies of requests in progress.
        hook_environment: what the hook scripts need to know.
        after_push: called when a push has ended.
    """

    def __init__(
        self,
        repositories: Repositories,
        *,
        bodies: Path,
        hook_environment: dict[str, str],
        after_push: Callable[[Repository], Awaitable[None]],
    ) -> None:
        self._repositories = repositories
        self._bodies = bodies
        self._hook_environment = hook_environment
        self._after_push = after_push
        self._writers: dict[str, asyncio.Lock] = {}
        self._readers = asyncio.Semaphore(_READERS)
        self._pushes: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def endpoint(self, request: Request) -> Response:
        """`/<owner>/<repo>.git/{info/refs,git-upload-pack,git-receive-pack}`."""
        path = request.path_params["rest"]
        try:
            repository = self._repositories.get(request.path_params["owner"], request.path_params["repo"])
        except NotFoundError as error:
            return PlainTextResponse(f"{error.message}\n", status_code=404)
        asked = request.query_params.get("service", "") if path == "info/refs" else path
        method = "GET" if path == "info/refs" else "POST"
        if asked not in SERVICES:
            return PlainTextResponse("only git's smart protocol is spoken here\n", status_code=403)
        if request.method != method:
            return PlainTextResponse(f"{method} is needed here\n", status_code=405, headers={"Allow": method})
        try:
            body = tempfile.TemporaryFile(dir=self._bodies)  # noqa: SIM115 - closed when git has ended
            async for chunk in request.stream():
                body.write(chunk)
            size = body.tell()
            body.seek(0)
        except ClientDisconnect:
            return Response(status_code=400)
        except OSError as error:
            log.error("a request's body cannot be kept: %s", error)
            return PlainTextResponse(f"the git server cannot keep the request: {error.strerror}\n", status_code=507)
        environment = self._environment(request, repository, path, size)
        job = _Job(environment, body)
        if path == "git-receive-pack":
            task = asyncio.create_task(self._push(repository, job))
        else:
            task = asyncio.create_task(self._read(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await job.response(end_with_client=path != "git-receive-pack")

    async def _push(self, repository: Repository, job: _Job) -> None:
        # The task goes on when the client has gone: what git began it ends, and the hook tells of it.
        lock = self._writers.setdefault(repository.full_name, asyncio.Lock())
        async with lock:
            try:
                await asyncio.to_thread(repository.remove_stale_locks)
                await job.run()
            finally:
                await self._after_push(repository)
            count = self._pushes[repository.full_name] = self._pushes.get(repository.full_name, 0) + 1
            if count % _PACK_EVERY == 0:
                await asyncio.to_thread(repository.git, "gc", "--auto", "--quiet", check=False)

    async def _read(self, job: _Job) -> None:
        async with self._readers:
            await job.run()

    def _environment(self, request: Request, repository: Repository, path: str, size: int) -> dict[str, str]:
        headers = request.headers
        variables = {
            "GIT_PROJECT_ROOT": str(repository.path.parent.parent),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": f"/{repository.owner}/{repository.name}.git/{path}",
            "REQUEST_METHOD": request.method,
            "QUERY_STRING": request.url.query,
            "CONTENT_TYPE": headers.get("content-type", ""),
            "CONTENT_LENGTH": str(size) if request.method == "POST" else "",
            "HTTP_CONTENT_ENCODING": headers.get("content-encoding", ""),
            "HTTP_GIT_PROTOCOL": headers.get("git-protocol", ""),
            "REMOTE_USER": request.scope["user_name"],
            "REMOTE_ADDR": request.client.host if request.client else "127.0.0.1",
            **self._hook_environment,
        }
        return git_environment(**{name: value for name, value in variables.items() if value})


class _Job:
    """One `git http-backend`: its process, and the answer as it comes out."""

    def __init__(self, environment: dict[str, str], body: IO[bytes]) -> None:
        self._environment = environment
        self._body = body
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=64)
        self._process: asyncio.subprocess.Process | None = None
        self._abandoned = asyncio.Event()

    async def run(self) -> None:
        """Run git to its end."""
        try:
            async with asyncio.timeout(_LIMIT_SECONDS):
                await self._run()
        except TimeoutError:
            log.error("git http-backend did not end within %.0f s", _LIMIT_SECONDS)
        except OSError as error:
            log.error("git http-backend cannot be run: %s", error)
        finally:
            self.end()
            self._body.close()
            await self._put(None)

    async def _run(self) -> None:
        process = self._process = await asyncio.create_subprocess_exec(
            "git",
            "http-backend",
            stdin=self._body,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        if process.stdout is not None:
            while chunk := await process.stdout.read(_CHUNK_BYTES):
                await self._put(chunk)
        code = await process.wait()
        if code != 0:
            log.warning("git http-backend ended with %d", code)

    async def _put(self, chunk: bytes | None) -> None:
        if self._chunks.full():
            # The client is slow, or has gone.
            put = asyncio.create_task(self._chunks.put(chunk))
            gone = asyncio.create_task(self._abandoned.wait())
            await asyncio.wait((put, gone), return_when=asyncio.FIRST_COMPLETED)
            put.cancel()
            gone.cancel()
        elif not self._abandoned.is_set():
            self._chunks.put_nowait(chunk)

    def end(self) -> None:
        """Kill what is left of git and its hooks."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def abandon(self) -> None:
        """Nobody reads the answer any more."""
        self._abandoned.set()

    async def response(self, *, end_with_client: bool) -> Response:
        """The answer: its head once git has written it, its body as it comes."""
        buffer = b""
        while b"\r\n\r\n" not in buffer and len(buffer) < _HEADER_BYTES:
            chunk = await self._chunks.get()
            if chunk is None:
                return PlainTextResponse("git gave no answer\n", status_code=500)
            buffer += chunk
        head, _, first = buffer.partition(b"\r\n\r\n")
        status, headers = 200, {}
        for line in head.decode("latin-1").split("\r\n"):
            name, _, value = line.partition(":")
            if name.lower() == "status":
                status = int(value.split()[0])
            else:
                headers[name] = value.strip()
        return _Answer(self, first, status, headers, end_with_client=end_with_client)

    async def rest(self, first: bytes) -> AsyncIterator[bytes]:
        """The answer's body."""
        if first:
            yield first
        while (chunk := await self._chunks.get()) is not None:
            yield chunk


class _Answer(StreamingResponse):
    def __init__(self, job: _Job, first: bytes, status: int, headers: dict[str, str], *, end_with_client: bool) -> None:
        super().__init__(job.rest(first), status_code=status, headers=headers)
        self._job = job
        self._end_with_client = end_with_client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.abandon()
            if self._end_with_client:
                self._job.end()
