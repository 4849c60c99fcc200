"""From a push to what is served, while clients go on asking. The tests build on each other, in their order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airloom.contract import DataVersion, Deployment, RunPlan
from airloom.flows.build import STATUS_CONTEXT
from airloom.flows.deployments import deployment
from airloom.flows.release import release_of, releases
from tests.e2e.actions import (
    PARAMS,
    STAGES,
    caches,
    code_of,
    edit,
    held,
    picture,
    process_of,
    run_of_push,
    started_by_push,
)
from tests.e2e.conftest import Platform
from tests.e2e.traffic import Traffic

LEARNS = "functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)"
LEARNS_NOTHING = "functional.cross_entropy(logits * 0, labels, label_smoothing=label_smoothing)"
PACKED = "rows_per_shard=params.rows_per_shard)"
ENCODED = "value = served.predictor.encode(output)"


@pytest.fixture(scope="module")
def modelling(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return platform.clone("ds_mlmodeling", tmp_path_factory.mktemp("clones") / "ds_mlmodeling")


@pytest.fixture(scope="module")
def serving(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return platform.clone("ds_modelserving", tmp_path_factory.mktemp("clones") / "ds_modelserving")


def traffic(platform: Platform) -> Traffic:
    return Traffic(platform.hooks.gateway.model_url("digits"), picture(platform))


def build_status(platform: Platform, repo: str, commit: str) -> dict[str, Any]:
    """Wait until the build of a commit has ended; its status."""

    def ended() -> dict[str, Any] | None:
        for status in platform.hooks.gitbucket.statuses(repo, commit):
            if status["context"] == STATUS_CONTEXT:
                return status if status["state"] != "pending" else None
        return None

    status: dict[str, Any] = platform.wait_for(f"the status of {repo}@{commit[:8]}", ended)
    return status


def champion(platform: Platform) -> str:
    found = platform.hooks.mlflow.alias("digits", "champion")
    assert found is not None
    return found.version


def deployed(platform: Platform) -> Deployment:
    found = deployment(platform.hooks, "digits")
    assert found is not None
    return found


def state_of(summary: dict[str, Any], task: str) -> str:
    return next(str(found["state"]) for found in summary["tasks"] if found["task"] == task)


def next_release(platform: Platform) -> str:
    """The number after the newest one's, which need not be what answers: one that was superseded has a number too."""
    major, minor, patch = releases(platform.hooks, "digits")[-1].version.split(".")
    return f"{major}.{minor}.{int(patch) + 1}"


def test_push_of_a_worse_model_is_rejected_and_the_champion_answers(platform: Platform, modelling: Path) -> None:
    before, was_champion = platform.deployed(), champion(platform)
    edit(modelling / "modeling" / "loss.py", LEARNS, LEARNS_NOTHING)
    with traffic(platform) as clients:
        commit = platform.push(modelling, "Learn nothing")
        summary = run_of_push(platform, "ds_mlmodeling", commit)
    assert (summary["state"], summary["verdict"]) == ("success", "rejected"), summary
    assert any("is not at least 0.9" in reason for reason in summary["reasons"]), summary
    assert {state_of(summary, task) for task in ("release", "deploy", "verify")} == {"skipped"}, summary
    decision = platform.returned(summary["run_id"], "gate")
    assert platform.hooks.mlflow.version("digits", decision["model_version"]).tags["airloom.gate"] == "rejected"
    assert (platform.deployed(), champion(platform)) == (before, was_champion)
    assert clients.failures == []
    assert set(clients.releases) == {before}
    assert clients.per_second >= 50


def test_push_of_a_good_model_is_served_and_no_request_is_lost(platform: Platform, modelling: Path) -> None:
    before, wanted = platform.deployed(), next_release(platform)
    assert before is not None
    edit(modelling / "modeling" / "loss.py", LEARNS_NOTHING, LEARNS)
    edit(modelling / "modeling" / "train.py", PARAMS, f'{PARAMS}.model_copy(update={{"epochs": 5}})')
    with traffic(platform) as clients:
        commit = platform.push(modelling, "Learn for longer")
        summary = run_of_push(platform, "ds_mlmodeling", commit)
    assert (summary["state"], summary["verdict"]) == ("success", "promoted"), summary
    now = platform.deployed()
    assert now == wanted
    release = release_of(platform.hooks, "digits", now)
    assert release.lineage["ds_mlmodeling"] == commit
    assert champion(platform) == release.model_version
    assert build_status(platform, "ds_mlmodeling", commit)["state"] == "success"
    assert clients.failures == []
    assert set(clients.releases) == {before, now}
    assert clients.per_second >= 50


def test_push_that_cannot_run_says_where_and_the_next_one_works(platform: Platform, serving: Path) -> None:
    """The next one changes nothing but the serving: no stage runs again, and the model stays."""
    before, wanted = release_of(platform.hooks, "digits", platform.deployed() or ""), next_release(platform)
    app = serving / "serving" / "app.py"
    good = app.read_text()
    app.write_text(f"{good}\ndef broken(:\n")
    broken = platform.push(serving, "Break the syntax")
    status = build_status(platform, "ds_modelserving", broken)
    assert status["state"] == "failure", status
    line = len(good.splitlines()) + 2
    assert f"serving/app.py:{line}" in status["description"]

    app.write_text(f"{good}\n# Nothing but a comment.\n")
    commit = platform.push(serving, "Mend the syntax")
    summary = run_of_push(platform, "ds_modelserving", commit)
    assert summary["state"] == "success", summary
    assert caches(summary) == dict.fromkeys(STAGES, "hit"), summary
    now = release_of(platform.hooks, "digits", platform.deployed() or "")
    assert now.version == wanted
    assert now.serving_commit == commit
    assert (now.model_version, now.model_digest) == (before.model_version, before.model_digest)
    recent = [run["dag_run_id"] for run in platform.hooks.airflow.runs("digits", limit=5)]
    assert broken not in [code_of(platform, run_id).get("ds_modelserving") for run_id in recent]


def check_rolled_back(platform: Platform, summary: dict[str, Any], *, before: str | None, was_champion: str) -> str:
    """What a rolled-back deployment leaves; the reason."""
    assert summary["state"] == "failed", summary
    assert (state_of(summary, "deploy"), state_of(summary, "verify")) == ("failed", "upstream_failed"), summary
    wanted = platform.returned(summary["run_id"], "release")["version"]
    reason = next(str(task["reason"]) for task in summary["tasks"] if task["task"] == "deploy")
    assert f"release {wanted} was rolled back, release {before} answers" in reason
    tasks = platform.hooks.airflow.task_instances("digits", summary["run_id"])
    notes = {task["task_id"]: task["note"] for task in tasks}
    assert "was rolled back" in (notes["deploy"] or "")
    found = deployed(platform)
    assert (found.state, found.release, found.previous) == ("rolled_back", wanted, before)
    assert (platform.deployed(), champion(platform)) == (before, was_champion)

    def left() -> list[str]:
        return [service.name for service in platform.hooks.supervisor.services() if wanted in service.name]

    platform.wait_for(f"the end of the process of {wanted}", lambda: not left(), evidence=left)
    return reason


def test_release_that_answers_wrongly_gets_no_traffic(platform: Platform, serving: Path) -> None:
    before, was_champion = platform.deployed(), champion(platform)
    edit(serving / "serving" / "engine.py", ENCODED, f'{ENCODED} | {{"label": "7" if index % 2 else "1"}}')
    with traffic(platform) as clients:
        commit = platform.push(serving, "Answer wrongly")
        summary = run_of_push(platform, "ds_modelserving", commit)
    reason = check_rolled_back(platform, summary, before=before, was_champion=was_champion)
    assert "reference answers differ from the evaluation's" in reason, reason
    assert clients.failures == []
    assert set(clients.releases) == {before}
    assert clients.per_second >= 50


def test_release_that_fails_under_traffic_is_rolled_back_and_the_next_one_is_served(
    platform: Platform, serving: Path
) -> None:
    before, was_champion = platform.deployed(), champion(platform)
    engine = serving / "serving" / "engine.py"
    right = engine.read_text().replace(f'{ENCODED} | {{"label": "7" if index % 2 else "1"}}', ENCODED)
    engine.write_text(right)
    # Enough good answers to pass the reference rows, and fewer than the steps ask for: ten each at the least.
    fails = "self._seen = getattr(self, '_seen', 0) + 1\n                assert self._seen < 45"
    edit(engine, ENCODED, f"{fails}\n                {ENCODED}")
    commit = platform.push(serving, "Fail after a while")
    summary = run_of_push(platform, "ds_modelserving", commit)
    reason = check_rolled_back(platform, summary, before=before, was_champion=was_champion)
    assert "500" in reason, reason

    engine.write_text(right)
    with traffic(platform) as clients:
        commit = platform.push(serving, "Answer rightly again")
        summary = run_of_push(platform, "ds_modelserving", commit)
    assert summary["state"] == "success", summary
    now = platform.deployed()
    assert now is not None
    assert release_of(platform.hooks, "digits", now).serving_commit == commit
    assert clients.failures == []
    assert set(clients.releases) == {before, now}
    assert champion(platform) == was_champion


def test_twenty_quick_pushes_end_with_the_last_one_served(platform: Platform, serving: Path) -> None:
    """Whoever is overtaken may not be built or served; nobody is built twice, and none is served after a later one."""
    was_champion = champion(platform)
    app = serving / "serving" / "app.py"
    good = app.read_text()
    commits = []
    with traffic(platform) as clients:
        for number in range(20):
            app.write_text(f"{good}\n# Push {number}.\n")
            commits.append(platform.push(serving, f"Change {number}"))
        summary = run_of_push(platform, "ds_modelserving", commits[-1], timeout=900)
        runs = [run["dag_run_id"] for run in platform.hooks.airflow.runs("digits", limit=25)]
        # Those of earlier ones may end later, and none of them may be what is served then.
        for run_id in runs:
            platform.ended(run_id)
    assert summary["state"] == "success", summary
    now = platform.deployed()
    assert now is not None
    assert release_of(platform.hooks, "digits", now).serving_commit == commits[-1]
    assert clients.failures == []
    assert champion(platform) == was_champion

    listed = json.loads(platform.airloom("pushes", "--repo", "ds_modelserving", "-n", "40", "--json").stdout)
    pushed = {push["commit"]: push for push in listed}
    built = [commit for commit in commits if pushed.get(commit, {}).get("build") == "built"]
    assert built[-1] == commits[-1]
    assert {pushed[commit]["builds"] for commit in built} == {1}, listed
    assert not [push for commit, push in pushed.items() if commit in commits and push["builds"] > 1]
    started = [code_of(platform, run_id).get("ds_modelserving", "") for run_id in reversed(runs)]
    order = [commits.index(commit) for commit in started if commit in commits]
    assert order == sorted(set(order)), order
    made = [release.serving_commit for release in releases(platform.hooks, "digits")]
    assert {commit: made.count(commit) for commit in commits if commit in made} == {commits[n]: 1 for n in order}
    assert "    built in " in platform.hooks.airflow.run("digits", summary["run_id"])["note"]


def data_of(platform: Platform, summary: dict[str, Any]) -> DataVersion:
    return DataVersion.model_validate(platform.returned(summary["run_id"], "version"))


def test_push_that_changes_preprocessing_makes_another_data_version(platform: Platform, tmp_path: Path) -> None:
    served, wanted = release_of(platform.hooks, "digits", platform.deployed() or ""), next_release(platform)
    before = {tag.name for tag in platform.hooks.git.list_tags("de_datapreprocessing", "digits/")}
    work = platform.clone("de_datapreprocessing", tmp_path / "de_datapreprocessing")
    # The same rows in other files: what is learnt stays as good, so that the gate has nothing against it.
    edit(work / "preprocessing" / "stage.py", PACKED, PACKED.replace(")", " // 2)"))
    commit = platform.push(work, "Pack fewer rows into a shard")
    summary = run_of_push(platform, "de_datapreprocessing", commit)
    assert (summary["state"], summary["verdict"]) == ("success", "promoted"), summary
    assert caches(summary) == dict.fromkeys(STAGES, "miss"), summary

    version = data_of(platform, summary)
    assert {tag.name for tag in platform.hooks.git.list_tags("de_datapreprocessing", "digits/")} - before == {
        version.tag
    }
    earlier, now = (
        json.loads(platform.hooks.git.read_tag("de_datapreprocessing", tag).message)
        for tag in (served.data_tag, version.tag)
    )
    assert version.md5 != served.data_md5
    assert now["rows"] == earlier["rows"]
    assert now["files"] > earlier["files"]
    release = release_of(platform.hooks, "digits", platform.deployed() or "")
    assert release.version == wanted
    assert (release.data_tag, release.data_md5) == (version.tag, version.md5)
    assert release.lineage == served.lineage | {"de_datapreprocessing": commit}
    for subject, other in ((f"digits-{release.version}", version.tag), (version.tag, f"digits-{release.version}")):
        shown = platform.airloom("lineage", subject).stdout
        assert other in shown, f"lineage {subject} does not lead to {other}\n{shown}"
        assert commit[:8] in shown


def test_a_revert_is_served_though_what_it_reverts_ends_later(platform: Platform, modelling: Path) -> None:
    """A comment in the code that a model carries: another release, as good as the one before it."""
    before, was_champion, wanted = deployed(platform).release, champion(platform), next_release(platform)
    file = modelling / "image_classifier" / "config.py"
    good = file.read_text()
    file.write_text(f"{good}# Not for long.\n")
    mistake = platform.push(modelling, "Make a mistake")
    run_id = started_by_push(platform, "ds_mlmodeling", mistake)
    training = platform.wait_for("its training", lambda: process_of(platform, run_id, "train"))
    with held(training["stage_pid"]):
        file.write_text(good)
        revert = platform.push(modelling, "Revert it")
        summary = run_of_push(platform, "ds_mlmodeling", revert)
        assert (summary["state"], summary["verdict"]) == ("success", "promoted"), summary
        assert (platform.deployed(), deployed(platform).state) == (before, "live")
    late = platform.ended(run_id)
    assert late["state"] == "success", platform.reasons(run_id)
    made = platform.returned(run_id, "release")["version"]
    assert made == wanted
    found = platform.returned(run_id, "deploy")
    assert (found["state"], found["previous"]) == ("superseded", before), found
    assert platform.returned(run_id, "verify")["superseded_by"] == before
    assert (platform.deployed(), champion(platform)) == (before, was_champion)
    said = {status["context"]: status for status in platform.hooks.gitbucket.statuses("ds_mlmodeling", mistake)}
    assert said["airloom/release/digits"]["description"].endswith(f"{before} of a later run answers")


def test_run_of_older_commits_gives_their_data_and_figures_again(platform: Platform) -> None:
    """Both repos have moved on since; forced, so that every stage runs anew."""
    then = data_of(platform, platform.first)
    plan = RunPlan.model_validate(platform.returned(platform.first["run_id"], "resolve"))
    older = {repo: plan.code[repo].commit for repo in ("de_datapreprocessing", "ds_mlmodeling")}
    for repo, commit in older.items():
        assert platform.hooks.git.head(repo) != commit
    asked = [part for repo, commit in older.items() for part in ("--commit", f"{repo}={commit[:10]}")]
    summary = platform.run("--force", *asked)
    assert summary["state"] == "success", summary
    again = RunPlan.model_validate(platform.returned(summary["run_id"], "resolve"))
    assert again.spec_digest == plan.spec_digest, "an earlier test has left another configuration"
    assert {repo: pin.commit for repo, pin in again.code.items()}.items() >= older.items()
    assert caches(summary) == dict.fromkeys(STAGES, "forced"), summary
    now = data_of(platform, summary)
    assert now.tag != then.tag
    assert (now.md5, now.digest) == (then.md5, then.digest)
    metrics, digest = platform.evaluated(platform.first["run_id"])
    assert platform.evaluated(summary["run_id"]) == (metrics, digest)
    assert "accuracy" in metrics
