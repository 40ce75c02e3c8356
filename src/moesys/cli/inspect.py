"""``moesys inspect``."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesys.cli.arguments import find_model

if TYPE_CHECKING:
    from moesys.checkpoint import WeightCheck

DeviceMemory = Annotated[
    str | None,
    typer.Option(
        help="Budget of GPU memory, or of RAM without a GPU: a size (8GiB) or a share of the weights (50%).",
        show_default="all there is",
    ),
]
HostMemory = Annotated[
    str | None, typer.Option(help="Budget of RAM: a size or a share.", show_default="all there is")
]


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model folder in Hugging Face layout, or org/model[@revision] on the hub."
        ),
    ],
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of KV cache to plan for.", show_default="4096, or the model's context"
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32 or bf16: as what it would be loaded.", show_default="as stored")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read all weights and look for NaN and Inf.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a checkpoint is, how large its parts are, and what of it fits where.

    Reads headers only, unless told to `--check`, which exits with 1 when a weight is not finite.

    Example: `moesys inspect runs/demo/export --host-memory 8GiB`
    """
    with _leave_garbage():
        from moesys.cli.inspect_report import Report, render_check
        from moesys.cli.inspect_sizing import SizingOptions, read_sized

        folder = find_model(model)
        report = Report(*read_sized(folder, SizingOptions(device_memory, host_memory, context, dtype)))
    if not as_json:
        print("\n".join(report.render_text()))
    found = _check(folder) if check else None
    if as_json:
        print(json.dumps(report.render_json(found), ensure_ascii=False))
    elif found is not None:
        print("\n".join(render_check(found)))
    if found is not None and found.found:
        raise typer.Exit(1)


@contextmanager
def _leave_garbage() -> Iterator[None]:
    """Collects no garbage inside: among a hundred thousand records without a cycle, looking takes half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check(folder: Path) -> WeightCheck:
    from moesys.checkpoint import check_weights
    from moesys.cli.progress import show_bytes

    with show_bytes("checking") as on_progress:
        return check_weights(folder, on_progress)
