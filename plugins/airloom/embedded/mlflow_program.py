"""`mlflow server`, without its first process: that one only waits for the server, and holds 200 MB meanwhile."""

from __future__ import annotations

import os
from typing import Any


def main() -> None:
    """Run MLflow's command line, and become the server where it would start one."""
    import mlflow.server
    from mlflow.cli import cli

    def become(command: list[str], *, extra_env: dict[str, str] | None = None, **_: Any) -> None:
        os.execvpe(command[0], command, {**os.environ, **(extra_env or {})})  # noqa: S606 - no shell is meant

    # Not public: should it go, MLflow runs as it does by itself.
    if hasattr(mlflow.server, "_exec_cmd"):
        mlflow.server._exec_cmd = become
    cli()


if __name__ == "__main__":
    main()
