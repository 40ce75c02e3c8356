"""What a checkpoint's ``quantization_config`` says of its numbers.

Knows which formats moesys decodes; knows nothing of tensors. A format that is not decoded is refused by its name,
before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesys.errors import ModelFormatError

QUANTIZATION_KEY = "quantization_config"

_SUPPORTED = "fp8 (e4m3 in blocks, as DeepSeek-V3) and mxfp4 (as gpt-oss)"


@dataclass(frozen=True)
class Fp8Blocks:
    """Matrices in float8 with one factor per block; the last block of a dimension may be partial.

    rows, columns: of a block; None where one factor holds for the whole matrix.
    """

    rows: int | None
    columns: int | None


def read_fp8_blocks(keys: Mapping[str, Any]) -> Fp8Blocks | None:
    """Returns how the FP8 tensors of a checkpoint are cut into blocks, from the keys of its ``config.json``.

    None where it says that it has none; MXFP4 tensors need no more than their names. Raises `ModelFormatError` for a
    format that moesys does not decode.
    """
    found = keys.get(QUANTIZATION_KEY) or None
    match found:
        case None | {"quant_method": "mxfp4"}:
            return None
        case {"quant_method": "fp8"}:
            return _read_fp8(found)
        case {"quant_method": str(method)}:
            raise ModelFormatError(
                f"quant_method {method!r} in {QUANTIZATION_KEY} is not supported (supported: {_SUPPORTED}); "
                "give unquantised weights"
            )
        case _:
            raise ModelFormatError(
                f"{QUANTIZATION_KEY} {found!r} names no quant_method (supported: {_SUPPORTED})"
            )


def _read_fp8(found: Mapping[str, Any]) -> Fp8Blocks:
    if (fmt := found.get("fmt", "e4m3")) != "e4m3":
        raise ModelFormatError(f"fmt {fmt!r} of fp8 weights is not supported (supported: 'e4m3')")
    match found.get("weight_block_size"):
        case None:
            return Fp8Blocks(None, None)
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return Fp8Blocks(rows, columns)
        case other:
            raise ModelFormatError(
                f"weight_block_size must be two whole numbers above 0 or null, got {other!r}"
            )
