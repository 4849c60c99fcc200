"""The serving stage: `python main.py serve --request request.json --result result.json`."""

from airloom.contract import Stage, run_stage_main
from serving.server import serve

if __name__ == "__main__":
    raise SystemExit(run_stage_main({Stage.SERVE: serve}))
