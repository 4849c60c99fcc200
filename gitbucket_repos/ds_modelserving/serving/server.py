"""The stage: serve until told to stop, then finish what is in flight."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn

from airloom.contract import Stage, StageInputError, StageRequest, StageResult
from serving.app import ServingApp
from serving.options import Options

log = logging.getLogger(__name__)

GRACE_SECONDS = 20  # for requests in flight when told to stop
# Longer than any proxy keeps idle connections, so that the proxy is the one who closes them.
KEEP_ALIVE_SECONDS = 180
# How long the model's thread may keep the interpreter from the event loop; the default of 5 ms shows in p99.
SWITCH_SECONDS = 0.001


class Server(uvicorn.Server):
    """uvicorn's server, but SIGTERM and SIGINT end it in order: exit code 0 after the last answer."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(request: StageRequest) -> StageResult:
    """Serve the request's model until SIGTERM.

    Raises:
        StageInputError: an input is not named, or the port is taken.
        ContractError: a parameter is wrong.
    """
    started_at = time.time()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    missing = [name for name in ("model", "release") if name not in request.inputs]
    if missing:
        raise StageInputError(f"the serve request names no input {' and no '.join(missing)}")
    options = Options.of(request)
    sys.setswitchinterval(SWITCH_SECONDS)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, str(options.threads))
    app = ServingApp(
        pipeline=request.pipeline,
        model=request.inputs["model"],
        release_file=request.inputs["release"],
        options=options,
    )
    server = Server(
        uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            http="httptools",
            loop="uvloop",
            ws="none",
            lifespan="on",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )
    try:
        server.run()
    except SystemExit as end:  # uvicorn's way to say that it could not start
        raise StageInputError(
            f"cannot listen on {options.host}:{options.port} (code {end.code}): is the port taken?"
        ) from end
    return StageResult(stage=Stage.SERVE, status="ok", started_at=started_at, finished_at=time.time())
