"""``moesys export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesys.cli.arguments import find_model

if TYPE_CHECKING:
    from moesys.checkpoint import StorageForm


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a run or of a model in Hugging Face layout, or org/model[@revision] on the hub.",
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; must not exist or be empty.")],
    dtype: Annotated[
        str | None, typer.Option(help="fp32 or bf16.", show_default="as trained or stored")
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Most bytes of weights in one file.", show_default="2GiB")
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            help="separate: tensors for each expert; stacked: one for all of a layer.",
            show_default="as the family is published",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read it back: compare every tensor, and the logits of a prompt.")
    ] = False,
) -> None:
    """Write a run's newest checkpoint, or a model, as a Hugging Face folder that transformers and moesys load.

    Quantised weights (FP8, MXFP4) are decoded. Tokenizer, chat templates and generation config come along.

    Example: `moesys export runs/tiny --to runs/tiny/export --dtype bf16`
    """
    from moesys.cli.progress import show_bytes

    form = _read_form(shard_size, experts)
    if _is_run(Path(model)):
        from moesys.training import export_run

        exported = export_run(Path(model), to, dtype, _warn, form=form, verify=verify)
    else:
        from moesys.checkpoint import convert_model, parse_dtype

        written_dtype = None if dtype is None else parse_dtype(dtype)
        with show_bytes("reading") as on_progress:
            exported = convert_model(
                find_model(model), to, written_dtype, form, verify=verify, on_progress=on_progress
            )
    print(f"wrote {exported.family} layout to {to}: {exported.describe()}")
    if exported.verification is not None:
        print(exported.verification.describe())
    print(f'next: moesys generate {to} -p "..."')


def _is_run(folder: Path) -> bool:
    return (folder / "config.toml").exists() and not (folder / "config.json").exists()


def _read_form(shard_size: str | None, experts: str | None) -> StorageForm:
    from moesys.checkpoint import StorageForm
    from moesys.errors import ConfigError
    from moesys.models import ExpertStorage
    from moesys.units import parse_bytes

    if experts is not None and experts not in list(ExpertStorage):
        raise ConfigError(f"--experts ({experts!r}) must be {' or '.join(ExpertStorage)}")
    form = StorageForm(experts=None if experts is None else ExpertStorage(experts))
    if shard_size is None:
        return form
    return StorageForm(parse_bytes(shard_size, "--shard-size"), form.experts)


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr)
