"""Jenkins' jobs, one for each stage repo. `python -m airloom.stack.jenkins` writes images/jenkins/jobs.groovy.

Job DSL makes them when Jenkins starts, with their triggers: one in a Jenkinsfile is there only after a first run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from airloom.settings import Settings, project_root

FILE = Path("images/jenkins/jobs.groovy")
GIT_URL = "http://git:8081"  # as the compose files name the git server
GIT_CREDENTIAL = "airloom-git"
TOKEN_CREDENTIAL = "airloom-hook-token"  # noqa: S105 - a name
SIGNATURE_CREDENTIAL = "airloom-hook-signature"

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
// Made by `python -m airloom.stack.jenkins` from the folders of gitbucket_repos: change that, not this.
"""
_JOB = """
pipelineJob('{repo}') {{
  description('Builds what is pushed to {owner}/{repo} with `airloom build`, and says on the commit how it went.')
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
          regexpFilterExpression('{expression}')
        }}
      }}
    }}
  }}
  definition {{
    cpsScm {{
      scm {{
        git {{
          remote {{
            url('{git_url}/git/{owner}/{repo}.git')
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

    @property
    def filter_expression(self) -> str:
        """What the filter's text must look like; Java's and Python's grammar."""
        name = re.escape(f"{self.owner}/{self.repo}")
        return rf"^{name} push refs/heads/main (?!0{{40}}$)[0-9a-f]{{40}}$"

    def render(self) -> str:
        """The job in Job DSL."""
        return _JOB.format(
            repo=self.repo,
            owner=self.owner,
            variables="\n".join(_VARIABLE.format(key=key, value=value) for key, value in VARIABLES.items()),
            headers="\n".join(_HEADER.format(key=key) for key in HEADERS),
            token=TOKEN_CREDENTIAL,
            text=FILTER_TEXT,
            expression=self.filter_expression.replace("\\", "\\\\"),
            git_url=GIT_URL,
            git_credential=GIT_CREDENTIAL,
        )


def jobs(project: Path) -> list[Job]:
    """One for each folder of gitbucket_repos that has a Jenkinsfile."""
    owner = Settings.model_fields["git_owner"].default
    found = sorted(path.parent.name for path in (project / "gitbucket_repos").glob("*/Jenkinsfile"))
    return [Job(repo, owner) for repo in found]


def definitions(project: Path) -> str:
    """The whole file."""
    return _HEAD + "".join(job.render() for job in jobs(project))


if __name__ == "__main__":
    root = project_root()
    (root / FILE).write_text(definitions(root), encoding="utf-8")
