"""``moesys resume``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moesys.cli.train import run_to_end


def resume(run: Annotated[Path, typer.Argument(help="Folder of an interrupted run.")]) -> None:
    """Go on with a run from its newest intact checkpoint, bit for bit.

    Example: `moesys resume runs/tiny`
    """
    from moesys.training import RunDirectory, Trainer, open_console

    steps = RunDirectory.open(run).load_config().training.steps
    with open_console(steps, sys.stdout) as console:
        run_to_end(Trainer.resume(run, console))
