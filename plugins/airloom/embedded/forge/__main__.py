"""Run the git server until SIGTERM: `python -m airloom.embedded.forge`."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType

import uvicorn

from airloom.embedded.forge.app import Forge
from airloom.settings import get_settings

_SHUTDOWN_SECONDS = 8


def main() -> None:
    """Serve on the address and port of the settings."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.umask(0o077)
    settings = get_settings()
    forge = Forge(settings)
    forge.start()
    config = uvicorn.Config(
        forge.app,
        host=settings.bind_host,
        port=settings.git_port,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    server = _Server(config, forge)
    try:
        server.run()
    finally:
        forge.stop()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, forge: Forge) -> None:
        super().__init__(config)
        self._forge = forge

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Builds end first: they talk to this server until their last word.
        self._forge.stop()
        super().handle_exit(signal.SIGTERM, frame)


if __name__ == "__main__":
    main()
