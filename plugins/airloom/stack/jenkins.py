"""Jenkins' jobs, one for each stage repo. `python -m airloom.stack.jenkins` writes images/jenkins/jobs.groovy.

Job DSL makes them when Jenkins starts or reads its configuration anew, with their triggers: one in a Jenkinsfile is
there only after a first run. Which repos there are, it reads from a file of this installation, so that a new one needs
no new image.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from airloom.settings import Settings, project_root

FILE = Path("images/jenkins/jobs.groovy")
GIT_URL = "http://git:8081"  # as the compose files name the git server
GIT_CREDENTIAL = "airloom-git"
TOKEN_CREDENTIAL = "airloom-hook-token"  # noqa: S105 - a name
SIGNATURE_CREDENTIAL = "airloom-hook-signature"
LIST_VARIABLE = "AIRLOOM_JENKINS_REPOS"  # of Jenkins' container: the path of the list
_FULL_NAME = "[A-Za-z0-9._-]+/[A-Za-z0-9._-]+"
FILTER_END = " push refs/heads/main (?!0{40}$)[0-9a-f]{40}$"

# Taken from the event: variables of the build, and of the filter.
VARIABLES = {
    "push_repository": "$.repository.full_name",
    "push_ref": "$.ref",
    "push_after": "$.after",
    "push_user": "$.pusher.name",
}
# In small letters and with underscores, these are variables too.
HEADERS = ("X-GitHub-Event", "X-GitHub-Delivery")
FILTER_TEXT = "$push_repository $x_github_event $push_ref $push_after"

_HEAD = """\
// Made by `python -m airloom.stack.jenkins`: change that, not this. One line of the list is one repo: OWNER/NAME.
def file = new File(System.getenv('{list_variable}') ?: '/none')
def names = file.exists() ? file.readLines('UTF-8') : []
names.findAll {{ it ==~ '{full_name}' }}.each {{ name ->
"""
_JOB = """\
  pipelineJob(name.split('/')[1]) {{
    description('Builds what is pushed to ' + name + ' with `airloom build`, and says on the commit how it went.')
    properties {{
      pipelineTriggers {{
        triggers {{
          genericTrigger {{
            genericVariables {{
{variables}
            }}
            genericRequestVariables {{ }}
            genericHeaderVariables {{
{headers}
            }}
            causeString('$push_user pushed $push_after')
            tokenCredentialId('{token}')
            printContributedVariables(false)
            printPostContent(false)
            regexpFilterText('{text}')
            regexpFilterExpression('^' + name.replace('.', '\\\\.') + '{expression}')
          }}
        }}
      }}
    }}
    definition {{
      cpsScm {{
        scm {{
          git {{
            remote {{
              url('{git_url}/git/' + name + '.git')
              credentials('{git_credential}')
            }}
            branch('refs/heads/main')
          }}
        }}
        scriptPath('Jenkinsfile')
        lightweight(false)
      }}
    }}
  }}
}}
"""
_VARIABLE = """\
              genericVariable {{
                key('{key}')
                value('{value}')
                expressionType('JSONPath')
                regexpFilter('')
                defaultValue('')
              }}"""

_HEADER = """\
              genericHeaderVariable {{
                key('{key}')
                regexpFilter('')
              }}"""


@dataclass(frozen=True)
class Job:
    """A stage repo's job: built is what a push puts at the tip of main, never a tag, another branch or a deletion."""

    repo: str
    owner: str


def template_repos(project: Path) -> list[str]:
    """The folders of gitbucket_repos that have a Jenkinsfile."""
    return sorted(path.parent.name for path in (project / "gitbucket_repos").glob("*/Jenkinsfile"))


def read_list(path: Path) -> list[Job]:
    """The jobs that a list gives, as jobs.groovy reads it; none where there is no list."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = (line.split("/") for line in lines if re.fullmatch(_FULL_NAME, line))
    return [Job(repo, owner) for owner, repo in found]


def list_file(settings: Settings) -> Path:
    """The list of this installation's repos, in a folder that Jenkins' container has mounted."""
    return settings.home_dir / "jenkins" / "repos"


def ensure_listed(settings: Settings, repos: Iterable[str]) -> bool:
    """Add repos to the list; whether Jenkins has not read it since it has changed."""
    path = list_file(settings)
    names = {f"{job.owner}/{job.repo}" for job in read_list(path)}
    wanted = "".join(f"{name}\n" for name in sorted({*names, *(f"{settings.git_owner}/{repo}" for repo in repos)}))
    if not path.exists() or path.read_text(encoding="utf-8") != wanted:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o755)  # Jenkins is another user where root starts the stack
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(wanted, encoding="utf-8")
        temporary.chmod(0o644)
        temporary.replace(path)
    read = _read_file(settings)
    return not read.exists() or read.read_text(encoding="utf-8") != wanted


def note_read(settings: Settings) -> None:
    """Note that Jenkins has read the list as it is."""
    _read_file(settings).write_text(list_file(settings).read_text(encoding="utf-8"), encoding="utf-8")


def _read_file(settings: Settings) -> Path:
    return list_file(settings).with_name("repos.read")


def definitions() -> str:
    """The whole file, in Job DSL."""
    return _HEAD.format(list_variable=LIST_VARIABLE, full_name=_FULL_NAME) + _JOB.format(
        variables="\n".join(_VARIABLE.format(key=key, value=value) for key, value in VARIABLES.items()),
        headers="\n".join(_HEADER.format(key=key) for key in HEADERS),
        token=TOKEN_CREDENTIAL,
        text=FILTER_TEXT,
        expression=FILTER_END,
        git_url=GIT_URL,
        git_credential=GIT_CREDENTIAL,
    )


if __name__ == "__main__":
    (project_root() / FILE).write_text(definitions(), encoding="utf-8")
