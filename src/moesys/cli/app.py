"""The command tree, and the one place where errors become messages."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from moesys.cli.bench import bench_app
from moesys.cli.chat import chat
from moesys.cli.config import config_app
from moesys.cli.doctor import doctor
from moesys.cli.eval import evaluate
from moesys.cli.export import export
from moesys.cli.generate import generate
from moesys.cli.inspect import inspect
from moesys.cli.pack import pack
from moesys.cli.plan import plan
from moesys.cli.resume import resume
from moesys.cli.train import train
from moesys.cli.verify import verify
from moesys.env import read_debug
from moesys.errors import MoesysError

app = typer.Typer(
    name="moesys",
    help="Train Mixture-of-Experts models on the memory you have; export and run them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(resume)
app.command()(export)
app.command()(inspect)
app.command()(generate)
app.command()(chat)
app.command(name="eval")(evaluate)
app.command()(doctor)
app.command()(plan)
app.command()(verify)
app.command()(pack)
app.add_typer(bench_app, name="bench")
app.add_typer(config_app, name="config")

_state = {"debug": read_debug()}


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from moesys import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _set_globals(
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback with every error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    _state["debug"] = _state["debug"] or debug


def main() -> None:
    """Runs the command line. Errors print one message to stderr and exit with status 1, misuse with 2.

    Ctrl-C (130) and a reader that has gone (`moesys config schema | head`) end quietly: typer sees to both.
    """
    try:
        app()
    except MoesysError as error:
        _fail(f"error: {error}")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"error: {place}{error.strerror or error}; check the disk space and permissions there")
    except Exception as error:  # noqa: BLE001  the last wall: anything here is a defect of moesys
        _fail(
            f"error: unexpected {type(error).__name__}: {error}\n"
            "this is a defect of moesys; run again with `moesys --debug ...` and report the traceback"
        )


def _fail(message: str) -> None:
    if _state["debug"]:
        traceback.print_exc()
    print(message, file=sys.stderr)
    sys.exit(1)
