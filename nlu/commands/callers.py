"""`nlu callers`: who may call a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nlu.commands.options import out

app = typer.Typer(no_args_is_help=True, help="Who may call a server, and how often.")


@app.callback()
def _group() -> None:
    """A group, though it has one command."""


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="The caller's name: letters, digits, - and _.")],
    file: Annotated[Path, typer.Option(help="The file NLU_CALLERS names; made where there is none.")],
    rate: Annotated[int | None, typer.Option(help="Calls a second. Default: no limit.")] = None,
    burst: Annotated[int | None, typer.Option(help="Calls at once. Default: one second's worth.")] = None,
) -> None:
    """Let a caller in. Its token is printed once and kept nowhere: the file has its SHA-256."""
    from nlu import callers

    token = callers.add(file, name, rate=rate, burst=burst)
    out.print(f"{file}: caller {name} added; running servers see it within a second. Its token:")
    sys.stdout.write(f"{token}\n")  # past rich, which would break a long line
