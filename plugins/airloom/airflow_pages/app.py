"""The FastAPI app that Airflow's server mounts at `/airloom`. Imported by that server alone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.resource_details import DagDetails
from airflow.api_fastapi.common.db.common import SessionDep
from airflow.api_fastapi.core_api.security import GetUserDep
from airflow.models.dagrun import DagRun
from airflow.models.xcom import XComModel
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader
from sqlalchemy import select

from airloom.airflow_pages.metrics import CONTENT_TYPE, render_metrics
from airloom.airflow_pages.monitoring import addresses, serving_targets
from airloom.airflow_pages.run_page import RunPage, run_links
from airloom.errors import AirloomError, NotFoundError, ServiceError
from airloom.flows.build import builds_of
from airloom.hooks.connect import Hooks
from airloom.settings import get_settings

RECENT_RUNS = 50
LATEST_PREDICTIONS = 20
# Everything on a page comes from the page itself: no script runs, and nothing is loaded from elsewhere.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def create_app() -> FastAPI:
    """The app. Pages need Airflow's login and the right to read the DAG; the metrics need neither."""
    app = FastAPI(title="Airloom", docs_url=None, redoc_url=None, openapi_url=None)
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
    templates.filters["short"] = lambda text: str(text or "")[:12]
    templates.filters["time"] = lambda seconds: f"{datetime.fromtimestamp(seconds, tz=UTC):%Y-%m-%d %H:%M:%S} UTC"
    templates.filters["figure"] = lambda value: "" if value is None else f"{value:.6g}"
    hooks = Hooks(get_settings())

    def page(name: str, status: int = 200, **values: Any) -> HTMLResponse:
        html = templates.get_template(name).render(airflow_url=hooks.settings.airflow_page_url, **values)
        return HTMLResponse(html, status_code=status, headers=SECURITY_HEADERS)

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> Response:
        wants_page = "text/html" in request.headers.get("accept", "")
        if error.status_code == 401 and wants_page:
            login = get_auth_manager().get_url_login(next_url=str(request.url))
            return RedirectResponse(login, status_code=302)
        return page("error.html", status=error.status_code, title=f"Error {error.status_code}", detail=error.detail)

    @app.exception_handler(AirloomError)
    def failed(request: Request, error: AirloomError) -> Response:
        status = 404 if isinstance(error, NotFoundError) else 503 if isinstance(error, ServiceError) else 500
        return page("error.html", status=status, title=type(error).__name__, detail=str(error))

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(render_metrics(hooks.ledger, addresses(hooks.settings)), media_type=CONTENT_TYPE)

    @app.get("/targets")
    def targets() -> JSONResponse:
        return JSONResponse(serving_targets(hooks.gateway))

    @app.get("/")
    def index(user: GetUserDep, session: SessionDep) -> Response:
        known = {path.stem for path in hooks.settings.configs_dir.glob("*.yaml")}
        readable = {name for name in known if _may_read(user, name)}
        query = select(DagRun).where(DagRun.dag_id.in_(readable)).order_by(DagRun.run_after.desc()).limit(RECENT_RUNS)
        runs = [
            {
                "pipeline": run.dag_id,
                "run_id": run.run_id,
                "state": str(run.state),
                "started_at": run.start_date,
                "address": f"/airloom/runs/{quote(run.dag_id, safe='')}/{quote(run.run_id, safe='')}",
            }
            for run in session.scalars(query)
        ]
        return page("index.html", runs=runs)

    @app.get("/runs/{pipeline}/{run_id:path}")
    def run_page(pipeline: str, run_id: str, user: GetUserDep, session: SessionDep) -> Response:
        _require_read(user, pipeline)
        run = session.scalar(select(DagRun).where(DagRun.dag_id == pipeline, DagRun.run_id == run_id))
        if run is None:
            raise NotFoundError(f"no run {run_id!r} of {pipeline!r}")
        query = select(XComModel.task_id, XComModel.value).where(
            XComModel.dag_id == pipeline, XComModel.run_id == run_id, XComModel.key == "return_value"
        )
        results = {task: _json(value) for task, value in session.execute(query)}
        plan = results.get("resolve") or {}
        content = RunPage(
            pipeline=pipeline,
            run_id=run_id,
            state=str(run.state),
            results=results,
            tasks=hooks.ledger.tasks(pipeline, run_id),
            links=run_links(results, hooks),
            builds=builds_of(hooks, {repo: pin["commit"] for repo, pin in (plan.get("code") or {}).items()}),
        )
        return page("run.html", run=content, run_part=quote(run_id, safe=""))

    @app.get("/receipts")
    def find_receipt(user: GetUserDep, prediction: Annotated[str, Query(alias="id")] = "") -> Response:
        if prediction.strip():
            return RedirectResponse(f"/airloom/receipts/{quote(prediction.strip(), safe='')}", status_code=302)
        known = (path.stem for path in sorted(hooks.settings.configs_dir.glob("*.yaml")))
        latest = {name: hooks.predictions.recent(name, LATEST_PREDICTIONS) for name in known if _may_read(user, name)}
        return page("receipts.html", latest=latest)

    @app.get("/receipts/{prediction_id}")
    def receipt_page(prediction_id: str, user: GetUserDep) -> Response:
        from airloom.flows.receipts import receipt

        found = receipt(hooks, prediction_id)
        _require_read(user, found.pipeline)
        run_address = f"/airloom/runs/{quote(found.pipeline, safe='')}/{quote(found.release.run_id, safe='')}"
        return page("receipt.html", receipt=found, run_address=run_address)

    return app


def _may_read(user: Any, pipeline: str) -> bool:
    return bool(get_auth_manager().is_authorized_dag(method="GET", details=DagDetails(id=pipeline), user=user))


def _require_read(user: Any, pipeline: str) -> None:
    if not _may_read(user, pipeline):
        raise HTTPException(403, f"you may not read {pipeline!r}")


def _json(value: Any) -> Any:
    """XComs are stored as JSON text, or as JSON by databases that know it."""
    import json

    return json.loads(value) if isinstance(value, str) else value
