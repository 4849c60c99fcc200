"""The way back, on a real git server: statuses on commits, and a release with its model card."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from airloom.contract import CodePin, GateDecision, Release, RunPlan, Stage, Verdict, VerifyReport
from airloom.errors import UnavailableError
from airloom.flows.commit_report import (
    report_failed_release,
    report_result,
    report_verified,
)
from airloom.hooks.connect import Hooks
from airloom.settings import Settings
from tests.fixtures.git import StageRepoFixture
from tests.fixtures.plans import make_data_version, make_plan

REASONS = ["accuracy 0.97 is at least 0.9", "accuracy 0.97 is 0.01 worse than the champion's 0.98"]


class Bench:
    """A run whose code is one commit of a real repo."""

    def __init__(self, repo: StageRepoFixture) -> None:
        self.repo = repo
        self.hooks = Hooks(repo.settings)
        self.commit = repo.commit("Widen the model", main__py="1")
        repo.push()
        pin = CodePin(
            repo=repo.name, commit=self.commit, message="Widen the model\n\nmore", author="Ada <a@example.org>"
        )
        plan = make_plan("manual__2026-11-21T10:00:00+00:00")
        stages = {stage: found.model_copy(update={"repo": repo.name}) for stage, found in plan.stages.items()}
        self.plan: RunPlan = plan.model_copy(update={"code": {repo.name: pin}, "stages": stages})

    def statuses(self) -> dict[str, tuple[str, str]]:
        found = self.hooks.gitbucket.statuses(self.repo.name, self.commit)
        return {row["context"]: (row["state"], row["description"]) for row in found}

    def decision(self, verdict: Verdict) -> GateDecision:
        rejected = verdict is Verdict.REJECTED
        return GateDecision(
            verdict=verdict,
            reasons=REASONS,
            failed=REASONS[1:] if rejected else [],
            metrics={"accuracy": 0.97},
            champion_metrics={"accuracy": 0.98},
            champion_version="6",
            model_name="digits",
            model_version="7",
            mlflow_run_id="m1",
            data_tag="t",
        )

    def release(self) -> Release:
        version = make_data_version()
        return Release(
            pipeline="digits",
            version="1.0.3",
            created_at=datetime.now(UTC),
            run_id=self.plan.run_id,
            model_name="digits",
            model_version="7",
            model_uri="models:/m-1",
            model_digest="d" * 64,
            mlflow_run_id="m1",
            data_tag=version.tag,
            data_md5=version.md5,
            serving_repo=self.repo.name,
            serving_commit=self.commit,
            environment="e" * 64,
            plan="s3://airloom/runs/digits/r/plan.json",
            lineage={self.repo.name: self.commit},
            metrics={"accuracy": 0.97},
        )

    def verified(self, **report: Any) -> None:
        report_verified(
            self.hooks,
            self.plan,
            VerifyReport(release="1.0.3", checked=20, equal=20, **report),
            release=self.release(),
            decision=self.decision(Verdict.PROMOTED),
            data_version=make_data_version(),
        )


@pytest.fixture
def bench(stage_repo: StageRepoFixture) -> Bench:
    return Bench(stage_repo)


def test_a_promoted_candidate_is_told_of_up_to_its_release(bench: Bench) -> None:
    for _ in range(2):  # a task that is tried again says the same
        report_result(bench.hooks, bench.plan, make_data_version())
        report_result(bench.hooks, bench.plan, bench.decision(Verdict.PROMOTED))
        report_result(bench.hooks, bench.plan, bench.release())
    found = bench.statuses()
    version = make_data_version()
    assert found["airloom/data/digits"] == (
        "success",
        f"{version.tag}: {version.files} files, {version.size_bytes:,} bytes",
    )
    assert found["airloom/gate/digits"] == ("success", f"digits: model 7 promoted: {'; '.join(REASONS)}")
    assert found["airloom/release/digits"] == ("pending", "release 1.0.3 of digits was made; it is being deployed")
    for _ in range(2):
        bench.verified()
    assert bench.statuses()["airloom/release/digits"] == (
        "success",
        "release 1.0.3 of digits answers: model 7, accuracy 0.97",
    )
    (release,) = bench.hooks.gitbucket.releases(bench.repo.name)
    assert (release["tag_name"], release["name"]) == ("release/digits/1.0.3", "digits 1.0.3")
    for piece in ("| accuracy | 0.97 | 0.98 |", REASONS[0], bench.commit[:12], version.tag, bench.plan.run_id):
        assert piece in release["body"]
    assert bench.hooks.git.read_tag(bench.repo.name, "release/digits/1.0.3").commit == bench.commit


def test_a_rejected_candidate_says_why_on_its_commit(bench: Bench) -> None:
    report_result(bench.hooks, bench.plan, bench.decision(Verdict.REJECTED))
    state, text = bench.statuses()["airloom/gate/digits"]
    assert (state, text) == ("failure", f"digits: model 7 rejected: {REASONS[1]}; {REASONS[0]}")
    (row,) = bench.hooks.gitbucket.statuses(bench.repo.name, bench.commit)
    assert row["target_url"].endswith("/dags/digits/runs/manual__2026-11-21T10%3A00%3A00%2B00%3A00")


def test_a_release_that_was_undone_says_why(bench: Bench) -> None:
    report_result(bench.hooks, bench.plan, bench.release())
    report_failed_release(bench.hooks, bench.plan, bench.release(), "release 1.0.3 was rolled back: 500")
    assert bench.statuses()["airloom/release/digits"] == (
        "failure",
        "release 1.0.3 of digits: release 1.0.3 was rolled back: 500",
    )


def test_a_release_that_a_later_one_has_replaced(bench: Bench) -> None:
    bench.verified(superseded_by="1.0.4")
    assert bench.statuses()["airloom/release/digits"] == (
        "success",
        "release 1.0.3 of digits was made; 1.0.4 of a later run answers",
    )


def test_the_gate_says_nothing_on_the_serving_code(bench: Bench) -> None:
    serving = CodePin(repo="none", commit="f" * 40, message="m", author="a")
    stages = {**bench.plan.stages, Stage.SERVE: bench.plan.stages[Stage.SERVE].model_copy(update={"repo": "none"})}
    plan = bench.plan.model_copy(update={"code": {**bench.plan.code, "none": serving}, "stages": stages})
    report_result(bench.hooks, plan, bench.decision(Verdict.PROMOTED))
    assert set(bench.statuses()) == {"airloom/gate/digits"}


def test_without_a_git_server_a_run_goes_on(
    bench: Bench, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UnavailableError("the git server did not answer")

    monkeypatch.setattr("airloom.hooks.gitbucket.GitBucket._call", refuse)
    monkeypatch.setattr("airloom.hooks.git.GitRemote._remote", refuse)
    report_result(bench.hooks, bench.plan, bench.decision(Verdict.PROMOTED))
    bench.verified()
    assert caplog.text.count("could not be") == 3
