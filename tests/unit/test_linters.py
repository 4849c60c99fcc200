"""What is not Python, read by the programs that know it: Dockerfiles, shell scripts, Groovy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from airloom.flows.build_steps import Step
from airloom.settings import SECRET_NAMES
from airloom.stack import jenkins
from tests.fixtures.jenkins_server import filter_expression

ROOT = Path(__file__).resolve().parents[2]
JENKINS = ROOT / "images" / "jenkins"
# Debian's groovy is of the version that Jenkins has in it.
GROOVY_JARS = Path("/usr/share/groovy/lib")
OPENS = [
    part for name in ("lang", "util", "io", "net") for part in ("--add-opens", f"java.base/java.{name}=ALL-UNNAMED")
]


def tracked(*patterns: str) -> list[Path]:
    """Files of the project, those that are about to be committed too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / line for line in done.stdout.splitlines()]


def is_shell(path: Path) -> bool:
    with path.open("rb") as file:
        return re.match(rb"#!.*\b(ba)?sh\b", file.readline(100)) is not None


def missing(what: str) -> None:
    """Skip, or fail where everything has to be there."""
    if os.environ.get("AIRLOOM_REQUIRE_DOCKER") == "1":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def linter(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if found is None:
        missing(f"{name} is not installed")
    return str(found)


def groovy(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("java") is None or not GROOVY_JARS.is_dir():
        missing("groovy is not installed: apt-get install groovy default-jre-headless")
    command = ["java", *OPENS, "-cp", f"{GROOVY_JARS}/*", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


DOCKERFILES = tracked("*Dockerfile", "*.Dockerfile")
PIPELINES = tracked("*Jenkinsfile", "*.groovy")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_hadolint(path: Path) -> None:
    command = [linter("hadolint"), "--config", str(ROOT / ".hadolint.yaml"), "--no-color", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_shellcheck() -> None:
    scripts = [path for path in tracked("*") if path.suffix not in {".py", ".png"} and is_shell(path)]
    assert {path.name for path in scripts} >= {"run", "build.sh", "docker-proxy"}
    done = subprocess.run([linter("shellcheck"), *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_linters_can_fail(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp\n")
    done = subprocess.run([linter("hadolint"), str(tmp_path / "Dockerfile")], capture_output=True, check=False)
    assert done.returncode != 0
    bad = tmp_path / "Jenkinsfile"
    bad.write_text("pipeline {\n  agent any\n  stages { stage('x') { steps { sh 'x' }\n")
    done = parsed(tmp_path, bad)
    assert done.returncode != 0
    assert "expecting '}'" in done.stdout + done.stderr


def parsed(folder: Path, *files: Path) -> subprocess.CompletedProcess[str]:
    """Compile, which needs none of Jenkins' own classes."""
    # Two scripts of one name are one class.
    copies = [folder / f"script{number}.groovy" for number in range(len(files))]
    for file, copy in zip(files, copies, strict=True):
        copy.write_text(file.read_text())
    return groovy(
        "org.codehaus.groovy.tools.FileSystemCompiler", "-d", str(folder / "classes"), *[str(path) for path in copies]
    )


def test_groovy_parses(tmp_path: Path) -> None:
    assert {path.name for path in PIPELINES} >= {"Jenkinsfile", "jobs.groovy"}
    done = parsed(tmp_path, *PIPELINES)
    assert done.returncode == 0, done.stdout + done.stderr


# Jenkins' jobs and configuration


def test_the_jobs_are_what_their_code_makes() -> None:
    assert (ROOT / jenkins.FILE).read_text() == jenkins.definitions(), "run: python -m airloom.stack.jenkins"


def calls(found: list[Any], *path: str) -> list[list[Any]]:
    """Values of the calls at this path of names."""
    for name in path[:-1]:
        found = [inner for call in found if call[0] == name for inner in call[2]]
    return [call[1] for call in found if call[0] == path[-1]]


def test_the_jobs_say_what_is_meant(tmp_path: Path) -> None:
    """The file itself is run, with a recorder in the place of Jenkins."""
    script = [str(ROOT / "tests" / "fixtures" / "job_dsl.groovy"), str(ROOT / jenkins.FILE)]
    repos = tmp_path / "repos"
    assert json.loads(groovy("groovy.ui.GroovyMain", *script, AIRLOOM_JENKINS_REPOS=str(repos)).stdout) == []
    names = [*(f"airloom/{repo}" for repo in jenkins.template_repos(ROOT)), "team-x/own.model_2"]
    repos.write_text("\n".join([*names, "", "no name", "a/b/c", "x/y'); evil('"]) + "\n")
    done = groovy("groovy.ui.GroovyMain", *script, AIRLOOM_JENKINS_REPOS=str(repos))
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    wanted = jenkins.read_list(repos)
    assert [f"{job.owner}/{job.repo}" for job in wanted] == names
    assert [call[:2] for call in made] == [["pipelineJob", [job.repo]] for job in wanted]
    assert len(wanted) == 4
    for (_, _, inner), job in zip(made, wanted, strict=True):
        trigger = ("properties", "pipelineTriggers", "triggers", "genericTrigger")
        assert calls(inner, *trigger, "tokenCredentialId") == [[jenkins.TOKEN_CREDENTIAL]]
        assert calls(inner, *trigger, "regexpFilterText") == [[jenkins.FILTER_TEXT]]
        assert calls(inner, *trigger, "regexpFilterExpression") == [[filter_expression(job)]]
        variable = (*trigger, "genericVariables", "genericVariable")
        keys, values = ([value for (value,) in calls(inner, *variable, name)] for name in ("key", "value"))
        assert dict(zip(keys, values, strict=True)) == jenkins.VARIABLES
        headers = calls(inner, *trigger, "genericHeaderVariables", "genericHeaderVariable", "key")
        assert headers == [[name] for name in jenkins.HEADERS]
        # The post's content may hold what a person wrote; a log is no place for it.
        assert calls(inner, *trigger, "printPostContent") == [[False]]
        remote = ("definition", "cpsScm", "scm", "git", "remote")
        assert calls(inner, *remote, "url") == [[f"http://git:8081/git/{job.owner}/{job.repo}.git"]]
        assert calls(inner, *remote, "credentials") == [[jenkins.GIT_CREDENTIAL]]


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        (f"airloom/ds_mlmodeling push refs/heads/main {'a' * 40}", True),
        (f"airloom/ds_mlmodeling push refs/heads/main {'0' * 39}1", True),
        (f"airloom/ds_mlmodeling push refs/heads/main {'0' * 40}", False),  # a deletion
        (f"airloom/ds_mlmodeling push refs/heads/main2 {'a' * 40}", False),
        (f"airloom/ds_mlmodeling push refs/tags/digits/CV_a {'a' * 40}", False),
        (f"airloom/ds_mlmodeling issues refs/heads/main {'a' * 40}", False),
        (f"airloom/ds_mlmodeling $x_github_event refs/heads/main {'a' * 40}", False),  # no such header
        (f"airloom/ds_modelserving push refs/heads/main {'a' * 40}", False),
        (f"x/airloom/ds_mlmodeling push refs/heads/main {'a' * 40}", False),
        ("airloom/ds_mlmodeling push refs/heads/main ", False),
        (f"airloom/ds.mlmodeling push refs/heads/main {'a' * 40}", False),
    ],
)
def test_what_starts_a_job(text: str, starts: bool) -> None:
    assert bool(re.search(filter_expression(jenkins.Job("ds_mlmodeling", "airloom")), text)) is starts


def test_the_configuration_fits_jobs_and_secrets() -> None:
    text = (JENKINS / "casc" / "jenkins.yaml").read_text()
    found = yaml.safe_load(text)
    entries = found["credentials"]["system"]["domainCredentials"][0]["credentials"]
    ids = {value["id"] for entry in entries for value in entry.values()}
    assert ids == {jenkins.GIT_CREDENTIAL, jenkins.TOKEN_CREDENTIAL, jenkins.SIGNATURE_CREDENTIAL}
    (item,) = found["unclassified"]["whitelist"]["whitelistItems"]
    assert item["hmacCredentialId"] == jenkins.SIGNATURE_CREDENTIAL
    assert found["unclassified"]["whitelist"]["enabled"] is item["hmacEnabled"] is True
    service = yaml.safe_load((ROOT / "docker-compose-devops.yml").read_text())["services"]["jenkins"]
    named = set(re.findall(r"\$\{([A-Za-z_]+)", text))
    secrets = {name for name in named if name.islower()}
    assert secrets <= set(service["secrets"])
    assert secrets <= set(SECRET_NAMES)
    assert secrets >= {"admin_password", "git_password", "webhook_secret", "jenkins_hook_token"}
    # Where the list of repos is, is where it is mounted.
    listed = Path(service["environment"][jenkins.LIST_VARIABLE])
    assert any(volume.endswith(f"/jenkins:{listed.parent}:ro") for volume in service["volumes"])
    assert {name for name in named if name.isupper()} <= {*service["environment"], "AIRLOOM_GIT_USER"}
    assert "password:" not in re.sub(r'password: "\$\{\w+\}"', "", text)


def test_every_plugin_is_pinned() -> None:
    lines = [line for line in (JENKINS / "plugins.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+:[\w.-]+", line) for line in lines)
    names = {line.partition(":")[0] for line in lines}
    assert {"configuration-as-code", "job-dsl", "git", "generic-webhook-trigger", "workflow-aggregator"} <= names
    assert names >= {
        "timestamper",
        "plain-credentials",
        "prometheus",
        "pipeline-model-definition",
        "pipeline-graph-view",
    }


def test_jenkinsfiles_are_the_same_and_name_no_repo() -> None:
    """Whoever copies one for a repo of their own has nothing to change in it."""
    texts = {path.parent.name: path.read_text() for path in (ROOT / "gitbucket_repos").glob("*/Jenkinsfile")}
    assert len(texts) == 3
    (text,) = set(texts.values())
    assert not [name for name in texts if name in text]
    assert 'REPO = "${env.JOB_BASE_NAME}"' in text


STAGES = [step.capitalize() for step in get_args(Step)]
EVENT = {"push_after": "b" * 40, "push_user": "Ada L", "x_github_delivery": "1-2"}


@pytest.fixture(scope="module")
def shells() -> dict[str, list[str]]:
    """What each stage of the Jenkinsfile has its shell do: the file itself is run, with a recorder for Jenkins."""
    script = [
        str(ROOT / "tests" / "fixtures" / "job_dsl.groovy"),
        str(ROOT / "gitbucket_repos/ds_mlmodeling/Jenkinsfile"),
    ]
    done = groovy("groovy.ui.GroovyMain", *script)
    assert done.returncode == 0, done.stderr
    ((_, _, inner),) = json.loads(done.stdout)
    stages = [call for part in inner if part[0] == "stages" for call in part[2]]
    return {name: [line for (line,) in calls(inside, "steps", "sh")] for _, (name,), inside in stages}


def test_a_job_has_a_stage_for_each_step(shells: dict[str, list[str]]) -> None:
    assert list(shells) == STAGES
    assert [len(lines) for lines in shells.values()] == [3, 1, 1, 1, 1]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        (EVENT, ["--once", "--pusher", "Ada L", "--delivery", "1-2"]),
        (
            {**EVENT, "push_user": "$(touch /tmp/x); `id`"},
            ["--once", "--pusher", "$(touch /tmp/x); `id`", "--delivery", "1-2"],
        ),
        ({}, []),  # a person's wish
    ],
)
def test_what_a_stage_runs(
    shells: dict[str, list[str]], tmp_path: Path, stage: str, variables: dict[str, str], arguments: list[str]
) -> None:
    program = tmp_path / "airloom"
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REPO": "ds_mlmodeling", "GIT_COMMIT": "c" * 40, **variables}
    command = ["/bin/sh", "-xec", shells[stage][-1]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    step = ["--until", stage.lower()]
    assert done.stdout.splitlines() == ["build", f"ds_mlmodeling@{'c' * 40}", *step, *arguments]


@pytest.mark.parametrize(("branch", "code"), [("origin/main", 0), ("refs/tags/digits/CV_a", 1), ("tags/v1", 1)])
def test_a_job_refuses_tags(shells: dict[str, list[str]], branch: str, code: int) -> None:
    command = ["/bin/sh", "-xec", shells["Inspect"][1]]
    done = subprocess.run(command, env={"GIT_BRANCH": branch}, capture_output=True, check=False)
    assert done.returncode == code
