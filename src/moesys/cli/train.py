"""``moesys train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesys.cli.arguments import ConfigArguments, read_config

if TYPE_CHECKING:
    from moesys.training import Trainer


def train(
    arguments: ConfigArguments = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run.", show_default="runs/DATE-TIME")
    ] = None,
) -> None:
    """Train a model.

    Ctrl-C saves and exits; `moesys resume RUN` goes on where it stopped.

    Example: `moesys train examples/tiny.toml model.num_experts=16 --run runs/tiny`
    """
    config = read_config(arguments)
    from datetime import datetime

    from moesys.training import Trainer, open_console

    folder = run if run is not None else Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    with open_console(config.training.steps, sys.stdout) as console:
        trainer = Trainer.start(config, folder, console)
        run_to_end(trainer)


def run_to_end(trainer: Trainer) -> None:
    """Trains a started or resumed run and says what to do next."""
    from moesys.training import exit_status

    console = trainer.console
    for line in trainer.describe():
        console.message(line)
    outcome = trainer.train()
    if outcome.interrupted_by is not None:
        raise typer.Exit(exit_status(outcome.interrupted_by))
    console.message(f"done; next: moesys export {trainer.run.path} --to {trainer.run.path / 'export'}")
