"""A pipeline as Markdown, for the people who look at its DAG."""

from __future__ import annotations

from airloom.contract.digest import canonical_json
from airloom.contract.enums import Stage
from airloom.spec.pipeline import PipelineSpec, StageSpec


def pipeline_doc(spec: PipelineSpec) -> str:
    """Description, input, stages, gate and deployment of a pipeline."""
    deploy = spec.deploy
    canary = " → ".join(f"{step} %" for step in deploy.canary.steps)
    lines = [
        f"# {spec.name}",
        "",
        spec.description,
        "",
        f"- **Owner**: {spec.owner}",
        f"- **Task**: {spec.task}, runner `{spec.runner.value}`",
        f"- **Input**: `{spec.source.uri}` {spec.source.description}".rstrip(),
        f"- **Configuration**: `dags/configs/{spec.name}.yaml`, digest `{spec.digest[:12]}`",
        "",
        "## Stages",
        "",
        "| stage | repo | cpus | memory | timeout | retries | parameters |",
        "|---|---|---|---|---|---|---|",
        *(_stage_row(stage, spec.stages[stage]) for stage in Stage if stage in spec.stages),
        "",
        "## Gate",
        "",
        *_gate_lines(spec),
        "",
        "## Deployment",
        "",
        f"Target `{deploy.target.value}`, releases {deploy.version}.x; traffic {canary}, each watched for "
        f"{deploy.canary.step_time:g} s; back at more than {deploy.canary.max_error_rate:.1%} errors or "
        f"{deploy.canary.max_latency_ratio:g} times the latency.",
    ]
    return "\n".join(lines)


def _stage_row(stage: Stage, spec: StageSpec) -> str:
    limits = spec.resources
    memory = f"{limits.memory / 2**30:g} GiB" if limits.memory >= 2**30 else f"{limits.memory / 2**20:g} MiB"
    # A bar would end the table's cell.
    params = canonical_json(spec.params).replace("|", "\\|") if spec.params else ""
    shown = f"`{params}`" if params else ""
    cells = (stage.value, f"`{spec.repo}`", f"{limits.cpus:g}", memory, f"{limits.timeout:g} s", spec.retries, shown)
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _gate_lines(spec: PipelineSpec) -> list[str]:
    lines = []
    for metric, bounds in spec.gate.thresholds.items():
        least = f"at least {bounds.min:g}" if bounds.min is not None else ""
        most = f"at most {bounds.max:g}" if bounds.max is not None else ""
        lines.append(f"- `{metric}` {' and '.join(part for part in (least, most) if part)}")
    if spec.gate.champion is not None:
        rule = spec.gate.champion
        lines.append(f"- `{rule.metric}` at most {rule.max_regression:g} worse than the champion's on the same data")
    if spec.gate.approval:
        lines.append("- a person approves")
    return lines or ["- none: every candidate is promoted"]
