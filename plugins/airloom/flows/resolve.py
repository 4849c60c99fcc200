"""Pin everything that a run means, once."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, StringConstraints, ValidationError

from airloom.contract import CodePin, Frozen, ImageRef, RunPlan, SourcePin, StagePin, Trigger, VersionTag
from airloom.contract.enums import DeployTarget, Runner, Stage
from airloom.contract.plan import safe_run_id
from airloom.errors import ConfigError, ConflictError, ContractError, NotFoundError
from airloom.flows.environment import store_environment
from airloom.spec.pipeline import PipelineSpec
from airloom.spec.stage_repo import StageRepo

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks
    from airloom.settings import Settings

log = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
PLAN_COPY = "data/plan.json"
MAIN = "main"

# A revision that git could take for an option, or that spans lines, is none.
Revision = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][^\s\x00-\x1f\x7f]*$", max_length=200)]


class RunParams(Frozen):
    """What a run may be given.

    Attributes:
        commits: stage repo -> branch, tag or hash to run instead of what `main` points at.
        reproduce: a version tag: run again what made it, with the code, parameters and source of then.
        force: run stages although equal ones ran before.
        skip_approval: ask nobody.
    """

    commits: dict[str, Revision] = Field(default_factory=dict)
    reproduce: str | None = None
    force: bool = False
    skip_approval: bool = False

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> RunParams:
        """Check what people or other programs gave.

        Raises:
            ConfigError: every problem, with the value found and what is allowed.
        """
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            lines = [_problem(detail) for detail in error.errors()]
            raise ConfigError(
                "\n".join(lines), hint=f"a run's parameters are: {', '.join(cls.model_fields)}"
            ) from error


def resolve(
    hooks: Hooks, *, spec: PipelineSpec, run_id: str, params: RunParams, trigger: Trigger, now: datetime
) -> RunPlan:
    """The plan of a run, stored as `runs/<pipeline>/<run>/plan.json`. The first one stored counts.

    Raises:
        ConfigError: a parameter names what the pipeline doesn't have, or a repo lacks one of its stages.
        NotFoundError: no such repo, commit, tag or source.
        BuildFailedError: a commit holds what can't be run.
        UnavailableError: the git server or the store does not answer.
    """
    bucket = hooks.settings.bucket_airloom
    prefix = f"runs/{spec.name}/{safe_run_id(run_id)}"
    key = f"{prefix}/{PLAN_FILE}"
    stored = _stored_plan(hooks, bucket, key)
    if stored is not None:
        return stored
    _check(spec, params)
    earlier = _plan_of_tag(hooks, spec, params.reproduce) if params.reproduce else None
    if earlier is not None:
        spec = _spec_of_then(spec, earlier)
    spec = _as_here(hooks.settings, spec)
    code = {repo: _code_pin(hooks, repo, params, earlier) for repo in spec.repos}
    environment = store_environment(hooks)
    stages = _pin_stages(hooks, spec, code, environment)
    if earlier is not None:
        source = _source_of_then(hooks, earlier)
        trigger = trigger.model_copy(update={"detail": _detail_of_reproduction(trigger, params, earlier, stages)})
    else:
        from airloom.flows.source import pin_source

        source = pin_source(hooks, spec.source, prefix)
    plan = RunPlan(
        pipeline=spec.name,
        run_id=run_id,
        created_at=now,
        runner=spec.runner,
        spec=spec.model_dump(mode="json"),
        spec_digest=spec.digest,
        code=code,
        stages=stages,
        source=source,
        trigger=trigger,
        reproduces=params.reproduce,
        force=params.force,
        skip_approval=params.skip_approval,
    )
    try:
        hooks.store.put_json(bucket, key, plan.model_dump(mode="json"), if_none_match=True)
    except ConflictError:  # a try that was thought dead finished first
        return _stored_plan(hooks, bucket, key) or plan
    return plan


def load_plan(hooks: Hooks, uri: str) -> RunPlan:
    """The plan at an address `s3://bucket/…/plan.json`.

    Raises:
        NotFoundError: there is none.
        ContractError: what is there is no plan.
    """
    bucket, key = hooks.store.split_uri(uri)
    plan = _stored_plan(hooks, bucket, key)
    if plan is None:
        raise NotFoundError(f"there is no plan at {uri}", hint="was it removed from the store?")
    return plan


def spec_of(plan: RunPlan) -> PipelineSpec:
    """The configuration that a plan holds, maybe of another version of Airloom.

    Raises:
        ContractError: this version cannot read it.
    """
    return PipelineSpec.stored(plan.spec, f"the configuration of run {plan.run_id}")


def plan_uri(hooks: Hooks, plan: RunPlan) -> str:
    """Where a plan is stored."""
    return run_plan_uri(hooks, plan.pipeline, plan.run_id)


def run_plan_uri(hooks: Hooks, pipeline: str, run_id: str) -> str:
    """Where the plan of a run is stored, once the run has one."""
    return f"s3://{hooks.settings.bucket_airloom}/runs/{pipeline}/{safe_run_id(run_id)}/{PLAN_FILE}"


def _stored_plan(hooks: Hooks, bucket: str, key: str) -> RunPlan | None:
    try:
        value = hooks.store.get_json(bucket, key)
    except NotFoundError:
        return None
    return RunPlan.stored(value, f"s3://{bucket}/{key}")


def _check(spec: PipelineSpec, params: RunParams) -> None:
    """Refuse parameters that this pipeline can't have."""
    unknown = [repo for repo in params.commits if repo not in spec.repos]
    if unknown:
        raise ConfigError(
            f"commits: {', '.join(map(repr, unknown))} is no stage repo of {spec.name}",
            hint=f"its repos are: {', '.join(spec.repos)}",
        )
    if params.reproduce and params.commits:
        raise ConfigError(
            f"reproduce {params.reproduce!r} fixes every commit, but commits names {', '.join(params.commits)}",
            hint="give one of the two",
        )


def _plan_of_tag(hooks: Hooks, spec: PipelineSpec, tag: str) -> RunPlan:
    """The plan of the run that wrote a version tag."""
    try:
        parsed = VersionTag.parse(tag)
    except ContractError as error:
        raise ConfigError(f"reproduce: {error.message}", hint=error.hint) from error
    if parsed.pipeline != spec.name:
        raise ConfigError(
            f"reproduce: {tag!r} is a version of {parsed.pipeline}, not of {spec.name}",
            hint=f"run {parsed.pipeline} instead, or name a tag that starts with {spec.name}/",
        )
    repo = spec.stages[Stage.PREPROCESS].repo
    info = hooks.git.read_tag(repo, tag)
    try:
        uri = str(json.loads(info.message)["plan"])
    except (ValueError, KeyError, TypeError) as error:
        raise ContractError(
            f"the message of the tag {tag!r} is no JSON with a plan, found {info.message[:100]!r}",
            hint="only tags that Airloom wrote can be reproduced",
        ) from error
    try:
        return load_plan(hooks, uri)
    except NotFoundError:
        # The tag's commit holds a copy, in case that old runs were cleared from the store.
        with suppress(NotFoundError, ValidationError):
            return RunPlan.model_validate_json(hooks.git.read_file(repo, info.commit, PLAN_COPY))
        raise


def _spec_of_then(spec: PipelineSpec, earlier: RunPlan) -> PipelineSpec:
    """What made the data and the model as it was then; gate, deployment and monitor as they are now.

    Otherwise an old configuration could promote what today's gate would reject.
    """
    today = spec.model_dump(mode="json")
    mixed = {**earlier.spec, **{part: today[part] for part in ("gate", "deploy", "monitor")}}
    return PipelineSpec.stored(mixed, f"the configuration of run {earlier.run_id}")


def _as_here(settings: Settings, spec: PipelineSpec) -> PipelineSpec:
    """The pipeline as this installation runs it.

    Raises:
        ConfigError: AIRLOOM_RUNNER or AIRLOOM_DEPLOY_TARGET is wrong, or the two don't go together.
    """
    value = spec.model_dump(mode="json")
    for variable, given, allowed in (
        ("AIRLOOM_RUNNER", settings.runner, Runner),
        ("AIRLOOM_DEPLOY_TARGET", settings.deploy_target, DeployTarget),
    ):
        if given and given not in list(allowed):
            raise ConfigError(
                f"{variable} is {given!r}", hint=f"allowed are: {', '.join(item.value for item in allowed)}"
            )
    value["runner"] = settings.runner or value["runner"]
    value["deploy"]["target"] = settings.deploy_target or value["deploy"]["target"]
    try:
        return PipelineSpec.model_validate(value)
    except ValidationError as error:
        raise ConfigError(
            f"{spec.name}: {error.errors()[0]['msg']}", hint="see AIRLOOM_RUNNER and AIRLOOM_DEPLOY_TARGET"
        ) from error


def _code_pin(hooks: Hooks, repo: str, params: RunParams, earlier: RunPlan | None) -> CodePin:
    if earlier is not None:
        if repo not in earlier.code:
            raise ContractError(f"the plan of run {earlier.run_id} has no commit of {repo}")
        return hooks.git.commit(repo, earlier.code[repo].commit)
    revision = params.commits.get(repo)
    return hooks.git.commit(repo, revision or hooks.git.head(repo, MAIN))


def _pin_stages(
    hooks: Hooks, spec: PipelineSpec, code: Mapping[str, CodePin], environment: str
) -> dict[Stage, StagePin]:
    from airloom.flows.build import ensure_checkout

    checkouts = {repo: ensure_checkout(hooks, repo, pin.commit) for repo, pin in code.items()}
    contents = {repo: StageRepo.load(folder) for repo, folder in checkouts.items()}
    pins = {}
    for stage, stage_spec in spec.stages.items():
        repo = stage_spec.repo
        try:
            digest = contents[repo].code_digest(checkouts[repo], stage)
        except ConfigError as error:
            raise ConfigError(f"{repo}@{code[repo].commit[:8]}: {error.message}", hint=error.hint) from error
        # A release is started by the deployment's target, not by the runner.
        if stage is Stage.SERVE:
            in_container = spec.deploy.target is DeployTarget.DOCKER
        else:
            in_container = spec.runner is Runner.DOCKER
        image = _image_of(hooks, code[repo]) if in_container else None
        pins[stage] = StagePin(
            repo=repo,
            code_digest=digest,
            environment=image.runtime if image else environment,
            params=stage_spec.params,
            seed=stage_spec.seed,
            image=image,
        )
    return pins


def _image_of(hooks: Hooks, pin: CodePin) -> ImageRef:
    """What the build of a commit made, or of the last one before it that changes something of a stage."""
    from airloom.flows.build import find_build
    from airloom.flows.changes import decide_commit

    record = find_build(hooks, pin.repo, pin.commit)
    if record is None:
        decision = decide_commit(hooks, pin.repo, pin.commit)
        if decision.changes_nothing and decision.base:
            record = find_build(hooks, pin.repo, decision.base)
    if record is None or record.image is None:
        raise NotFoundError(
            f"there is no image of {pin.repo}@{pin.commit[:8]}, which the pipeline needs in this installation",
            hint=f"build it: airloom build {pin.repo}@{pin.commit[:8]}",
        )
    return record.image


def _source_of_then(hooks: Hooks, earlier: RunPlan) -> SourcePin:
    bucket, key = hooks.store.split_uri(earlier.source.manifest)
    if not hooks.store.exists(bucket, key):
        raise NotFoundError(
            f"the list of raw data of run {earlier.run_id} is gone: {earlier.source.manifest}",
            hint="what it read is no longer known; start a new run",
        )
    return earlier.source


def _detail_of_reproduction(
    trigger: Trigger, params: RunParams, earlier: RunPlan, stages: Mapping[Stage, StagePin]
) -> str:
    """The trigger's detail, and a warning where the packages are not those of then."""
    parts = [trigger.detail] if trigger.detail else []
    parts.append(f"reproduces {params.reproduce} of run {earlier.run_id}")
    differ: dict[tuple[str, str], list[str]] = {}
    for stage, pin in stages.items():
        then = earlier.stages[stage].environment if stage in earlier.stages else pin.environment
        if then != pin.environment:
            differ.setdefault((then, pin.environment), []).append(stage.value)
    for (then, now), names in differ.items():
        warning = (
            f"the environment of {', '.join(names)} differs from then ({then[:12]}, now {now[:12]}): results may differ"
        )
        log.warning("%s", warning)
        parts.append(warning)
    return "; ".join(parts)


def _problem(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{key}: there is no such parameter"
    if detail["type"] == "string_pattern_mismatch":
        return f"{key}: {detail['input']!r} is no branch, tag or hash"
    return f"{key}: {detail['msg']}, found {detail['input']!r}"
