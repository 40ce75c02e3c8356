"""``moesys doctor``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    folder: Annotated[
        str | None,
        typer.Option(
            help="A model, or a folder on the disk that models lie on; without a large file there one is made for "
            "the measurement.",
            show_default="the current folder",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure this machine: memory, arithmetic and disk, each alone and together. Takes less than a minute.

    What it finds is saved for `moesys plan`. It ends with what slows this machine down and how to mend it.

    Example: `moesys doctor --folder models/`
    """
    from moesys.cli.doctor_report import encode_doctor, render_doctor
    from moesys.cli.profiles import measure_and_save
    from moesys.planning.environment import list_advice, read_environment

    path = _find_path(folder)
    environment = read_environment(path)
    profile, file = measure_and_save(path)
    advice = list(list_advice(environment, profile))
    if as_json:
        print(json.dumps(encode_doctor(environment, profile, advice, file), ensure_ascii=False))
    else:
        sys.stdout.write("\n".join(render_doctor(environment, profile, advice, file)) + "\n")


def _find_path(folder: str | None) -> Path:
    from moesys.cli.arguments import find_model

    if folder is None:
        return Path.cwd()
    return Path(folder) if Path(folder).exists() else find_model(folder)
