"""`airloom images`: the runtimes and stage images of this installation, and copies of everybody else's."""

from __future__ import annotations

from typing import Annotated

import typer

from airloom.cli.output import command_group, print_json, print_table, reports_errors, say

images = command_group("Build the runtimes, list images, copy external ones to the registry.")


@images.command()
@reports_errors
def build(
    runtimes: Annotated[
        list[str] | None, typer.Argument(help="preprocessing, training, serving; all without one")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="build although they are there")] = False,
) -> None:
    """Build the runtime images that stage images are built from."""
    import time

    from airloom.errors import ConfigError
    from airloom.flows.images import RUNTIMES, ensure_runtime
    from airloom.settings import get_settings

    wrong = [name for name in runtimes or [] if name not in RUNTIMES]
    if wrong:
        raise ConfigError(f"there is no runtime {', '.join(wrong)}", hint=f"there are: {', '.join(RUNTIMES)}")
    for runtime in runtimes or RUNTIMES:
        started = time.monotonic()
        reference = ensure_runtime(get_settings(), runtime, typer.echo, rebuild=rebuild, pushed=True)
        say(f"{reference} is there, {time.monotonic() - started:.1f} s")


@images.command("list")
@reports_errors
def list_images(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """List the installation's images in the engine that runs stages: tag, digest, size and age."""
    import time

    from airloom.flows.images import images_here
    from airloom.settings import get_settings

    rows = images_here(get_settings())
    if as_json:
        print_json({"images": rows})
        return
    now = time.time()
    print_table(
        ["image", "tag", "digest", "size", "age"],
        [
            (
                row["name"],
                row["tag"],
                row["digest"][7:19],
                f"{row['size_bytes'] / 1e6:.0f} MB",
                _age(now - row["created"]),
            )
            for row in rows
        ],
    )


@images.command()
@reports_errors
def mirror(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Copy every external image of .env to the registry; print the lines that make the stack use the copies."""
    from airloom.flows.mirror import external_images
    from airloom.flows.mirror import mirror as copy
    from airloom.settings import get_settings

    settings = get_settings()
    copied, failed = copy(settings, external_images(settings), lambda line: None if as_json else typer.echo(line))
    if as_json:
        print_json({"copied": copied, "failed": failed})
    else:
        say("\nlines for .env.local:")
        for variable, reference in copied.items():
            typer.echo(f"{variable}={reference}")
        for line in failed:
            typer.echo(f"not copied: {line}", err=True)
    if failed:
        raise SystemExit(1)


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.add_typer(images, name="images")
