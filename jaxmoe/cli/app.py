"""The program, and what all its commands have in common: one error, one JSON object, one exit code."""

import functools
import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

import jaxmoe
from jaxmoe.cli.arguments import import_module
from jaxmoe.errors import JaxmoeError

app = typer.Typer(
    help="Compress the experts of Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 200)


def _version(value: bool) -> None:
    if value:
        print(f"jaxmoe {jaxmoe.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="MODULE", help="module or Python file that registers further methods; may be repeated"
        ),
    ] = None,
) -> None:
    """Compress the experts of Mixture-of-Experts language models."""
    for name in modules or []:
        try:
            import_module(name)
        except JaxmoeError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None


def command(function):
    """Register a command whose known errors end in one message and exit code 1."""

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (JaxmoeError, PermissionError) as error:
            if kwargs.get("as_json"):
                print(json.dumps({"error": str(error)}))
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            resumes = "; the same command goes on where it stopped" if {"resume", "report"} & kwargs.keys() else ""
            print(f"stopped{resumes}", file=sys.stderr)
            raise typer.Exit(130) from None

    return app.command(name=function.__name__.rstrip("_"))(guarded)


def emit(record: dict[str, Any], as_json: bool, *tables) -> None:
    """Print a record as one JSON object, or what people read of it."""
    if as_json:
        print(json.dumps(record))
        return
    for entry in tables:
        out.print(entry)
        out.print()
