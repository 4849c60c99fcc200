"""The supervisor as a program: `python -m airloom.embedded`, in the foreground."""

from __future__ import annotations

import argparse

from airloom.embedded.launch import serve
from airloom.embedded.platform import services
from airloom.settings import get_settings


def main() -> int:
    """Run the platform until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m airloom.embedded", description=__doc__)
    parser.add_argument("--report", type=int, help="descriptor of a pipe that is told how the start went")
    return serve(get_settings(), services, parser.parse_args().report)


raise SystemExit(main())
