"""`airloom repos`: the stage repos of this installation, and new ones."""

from __future__ import annotations

from typing import Annotated

import typer

from airloom.cli.output import command_group, print_json, print_table, reports_errors, say

repos = command_group("List stage repos; add one.")


@repos.command()
@reports_errors
def add(name: Annotated[str, typer.Argument(help="lower-case letters, digits, '_', '-' and '.'")]) -> None:
    """Make an empty repository on the git server whose pushes are built; one that is there keeps what it holds."""
    from airloom.embedded.launch import is_running
    from airloom.embedded.provision import add_repo
    from airloom.hooks.connect import Hooks
    from airloom.stack.launch import add_repo as add_in_stack
    from airloom.stack.launch import is_up

    hooks = Hooks()
    if not is_running(hooks.settings) and is_up(hooks.settings):
        add_in_stack(hooks.settings, name)
    else:
        add_repo(hooks, name)
    user = hooks.settings.git_user
    say(f"{name} is there, and its pushes are built:")
    typer.echo(f"  git clone {hooks.git.clone_url(name).replace('://', f'://{user}@')}")


@repos.command("list")
@reports_errors
def list_repos(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """List the git server's repositories and which pipelines use them."""
    from airloom.hooks.connect import Hooks
    from airloom.spec.load import load_pipelines

    hooks = Hooks()
    users: dict[str, list[str]] = {}
    for spec in load_pipelines(hooks.settings.configs_dir)[0]:
        for repo in spec.repos:
            users.setdefault(repo, []).append(spec.name)
    rows = [
        {
            "name": found["name"],
            "description": found.get("description") or "",
            "pipelines": users.get(found["name"], []),
        }
        for found in hooks.gitbucket.list_repos()
    ]
    if as_json:
        print_json({"repos": rows})
        return
    print_table(
        ["repo", "pipelines", "description"],
        [(row["name"], ", ".join(row["pipelines"]), row["description"]) for row in rows],
    )


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.add_typer(repos, name="repos")
