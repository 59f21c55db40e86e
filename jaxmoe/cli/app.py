"""The program, and what all its commands have in common: one error, one JSON object, one exit code."""

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import jaxmoe
from jaxmoe.cli.arguments import import_module
from jaxmoe.cli.last_resort import explain
from jaxmoe.errors import JaxmoeError, readable

# What all errors of usage are; from where it can be imported differs between typer's versions.
_Usage: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class _Commands(TyperGroup):
    """The commands, whose errors of usage are as short as all others: values may have thousands of letters."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _shortened_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _shortened_usage():
            return super().invoke(ctx)


@contextmanager
def _shortened_usage() -> Iterator[None]:
    try:
        yield
    except _Usage as error:
        error.__dict__["message"] = readable(str(error))
        raise


app = typer.Typer(
    cls=_Commands,
    help="Compress the experts of Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
if sys.stdout is None:
    # Started with standard output closed: what would be printed goes nowhere.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 200)
_debug = ContextVar("debug", default=False)


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
            "--import",
            metavar="MODULE",
            help="module or Python file that registers methods or architectures; may be repeated",
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="show where an error arose, for reports of defects")] = False,
) -> None:
    """Compress the experts of Mixture-of-Experts language models."""
    _debug.set(debug)
    with guard():
        for name in modules or []:
            import_module(name)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose errors end in one message and exit code 1."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        with guard(as_json=kwargs.get("as_json", False), resumes=bool({"resume", "report"} & kwargs.keys())):
            function(*args, **kwargs)
            # Here, where a full disk or a reader that is gone becomes a message, and not when Python ends.
            sys.stdout.flush()

    return app.command(name=function.__name__.rstrip("_"))(guarded)


@contextmanager
def guard(*, as_json: bool = False, resumes: bool = False) -> Iterator[None]:
    """Turn whatever is raised within into one message on standard error and an exit code.

    Args:
        as_json: whether standard output gets the message too, as `{"error": ...}`.
        resumes: whether the same command resumes where it stopped.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, _Usage):
        raise
    except BrokenPipeError:
        # Whoever read standard output has read enough, as `head` has: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print(f"stopped{'; the same command resumes where it stopped' if resumes else ''}", file=sys.stderr)
        raise typer.Exit(130) from None
    except Exception as error:  # The last resort: a user gets a message, whatever was overlooked.
        if _debug.get():
            traceback.print_exc()
        _say(str(error) if isinstance(error, JaxmoeError) else explain(error), as_json)
        raise typer.Exit(1) from None


def _say(message: str, as_json: bool) -> None:
    message = readable(message)
    if as_json:
        # Standard output may be what failed.
        with suppress(OSError):
            print(json.dumps({"error": message}), flush=True)
    print(f"error: {message}", file=sys.stderr)


def run() -> None:
    """Run the program to its exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        # Names of files need not be text, and are printed all the same.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # What is printed outside of commands, such as help, can fail too.
        with guard():
            app()
    except typer.Exit as end:
        sys.exit(end.exit_code)


def emit(record: Any, as_json: bool, *tables: Any) -> None:
    """Print a record as one JSON object, or what people read of it."""
    if as_json:
        print(json.dumps(record if isinstance(record, dict) else record.as_json()))
        return
    for entry in tables:
        out.print(entry)
        out.print()
