"""``moesys export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; must not exist or be empty.")],
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16.", show_default="as trained")] = None,
) -> None:
    """Write a run's newest checkpoint as a Hugging Face folder that transformers, vLLM and moesys load.

    Example: `moesys export runs/tiny --to runs/tiny/export --dtype bf16`
    """
    from moesys.training import export_run

    exported = export_run(run, to, dtype, on_damage=lambda text: print(f"WARNING: {text}", file=sys.stderr))
    print(f"wrote {exported.family} layout to {to}: {exported.describe()}")
    print(f'next: moesys generate {to} -p "..."')
