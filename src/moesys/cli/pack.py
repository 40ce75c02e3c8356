"""``moesys pack``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesys.cli.arguments import FolderArgument

if TYPE_CHECKING:
    from moesys.checkpoint.module_packer import PackedPart
    from moesys.checkpoint.packing import PackedModel

_INT8 = "int8"


def pack(
    model: FolderArgument,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="File to write.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="fp32 or bf16; or int8, which rounds all matrices but embedding and routers.",
            show_default="as stored",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE where it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model as one file from which each expert is read by itself, with checksums of everything.

    It runs where a folder does, and within `--host-memory` too where the folder's own layout would not. Tokenizer, chat
    templates and generation config come along. Quantised weights (FP8, MXFP4) are decoded.

    Example: `moesys pack runs/demo/export --to demo.packed --dtype int8`
    """
    from moesys.checkpoint import parse_dtype
    from moesys.checkpoint.packed_form import PackedForm
    from moesys.checkpoint.packing import pack_model
    from moesys.cli.progress import show_bytes
    from moesys.errors import ConfigError

    if dtype not in (None, "fp32", "bf16", _INT8):
        raise ConfigError(f"--dtype ({dtype!r}) must be fp32, bf16 or int8")
    form = PackedForm.INT8 if dtype == _INT8 else PackedForm.FLOAT
    stored_dtype = None if dtype is None or form is PackedForm.INT8 else parse_dtype(dtype)
    with show_bytes("packing") as on_progress:
        packed = pack_model(model, to, stored_dtype, form, overwrites=overwrite, on_progress=on_progress)
    if as_json:
        print(json.dumps(_encode(packed)))
        return
    print("\n".join(_render(packed)))


def _render(packed: PackedModel) -> list[str]:
    from moesys.checkpoint.packed_form import PackedForm
    from moesys.units import format_bytes, format_count

    lines = [
        f"wrote {packed.family} to {packed.path}: {format_count(packed.num_parameters)} parameters, "
        f"{format_bytes(packed.num_bytes)}",
        f"  {'part':<14}{'parameters':>12}{'bytes':>12}{'bits/weight':>13}",
        *(_render_part(part) for part in packed.parts),
        f"  {'all':<14}{format_count(packed.num_parameters):>12}{format_bytes(packed.num_weight_bytes):>12}"
        f"{packed.bits_per_weight:>13.2f}",
    ]
    if packed.form is PackedForm.INT8:
        lines.append(
            "int8 is lossy: errors are shares of the root mean square of the part's weights; compare with moesys eval"
        )
    elif packed.is_lossy:
        lines.append("lossy: float32 weights were rounded to bfloat16")
    if not packed.has_tokenizer:
        return [
            *lines,
            "there was no tokenizer.json to come along: with one in the folder, pack again to write text",
        ]
    return [*lines, f'next: moesys generate {packed.path} -p "..."']


def _render_part(part: PackedPart) -> str:
    from moesys.units import format_bytes, format_count

    line = (
        f"  {part.part.value:<14}{format_count(part.num_parameters):>12}{format_bytes(part.num_bytes):>12}"
        f"{part.bits_per_weight:>13.2f}"
    )
    if part.error is None:
        return line
    return f"{line}  int8, off by {part.error.mean:.2%} on average, {part.error.largest:.2%} at most"


def _encode(packed: PackedModel) -> dict[str, Any]:
    return {
        "path": str(packed.path),
        "family": packed.family,
        "weights": packed.form.value,
        "is_lossy": packed.is_lossy,
        "dtype": str(packed.dtype).removeprefix("torch."),
        "num_parameters": packed.num_parameters,
        "num_bytes": packed.num_bytes,
        "bits_per_weight": packed.bits_per_weight,
        "parts": {part.part.value: _encode_part(part) for part in packed.parts},
    }


def _encode_part(part: PackedPart) -> dict[str, Any]:
    return {
        "num_parameters": part.num_parameters,
        "num_bytes": part.num_bytes,
        "bits_per_weight": part.bits_per_weight,
        "largest_error": None if part.error is None else part.error.largest,
        "mean_error": None if part.error is None else part.error.mean,
    }
