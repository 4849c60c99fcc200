"""Write the dashboards' JSON: `python -m monitoring.grafana.build`. Grafana reads what stands in `dashboards/`.

The JSON is kept in git, so that Grafana needs nothing but these files; a test compares them with what this makes.
"""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from monitoring.grafana import models, pipelines, releases

FOLDER = Path(__file__).parent / "dashboards"


def built() -> dict[str, str]:
    """File name -> JSON of each dashboard."""
    boards = (pipelines.build(), releases.build(), models.build())
    return {f"{_uid(board)}.json": _json(board) for board in boards}


def _uid(board: Dashboard) -> str:
    return str(board.build().uid)


def _json(board: Dashboard) -> str:
    found = board.build()
    # Grafana numbers panels without an id anew at each load, and addresses of single panels would change.
    for number, panel in enumerate(found.panels or [], start=1):
        panel.id_val = number
    return str(JSONEncoder(sort_keys=True, indent=1).encode(found)) + "\n"


def main() -> None:
    """Write every file; remove what no dashboard makes any more."""
    files = built()
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        if path.name not in files:
            path.unlink()
    for name, text in files.items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
