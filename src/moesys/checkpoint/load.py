"""A model held in memory as a whole, from whichever of the two kinds of checkpoint it lies in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from moesys.checkpoint import hf
from moesys.checkpoint.offloaded import require_no_product
from moesys.checkpoint.packed_file import is_packed_path
from moesys.checkpoint.packed_weights import open_packed, require_dtype
from moesys.kernels import Int8Product
from moesys.models import Decoder


def load_model(
    path: Path,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    product: Int8Product | None = None,
) -> Decoder:
    """Loads a model folder or a packed file into our decoder, for inference.

    dtype: of the weights of a folder, see `moesys.checkpoint.hf.load_model`; a packed file keeps the one that it was
    packed in. product: how int8 weights are multiplied; None for ``w8``. ``on_progress`` gets (bytes read, bytes to
    read).

    Raises `ModelFormatError` for a model that does not fit or a dtype that a packed file does not have,
    `SectionReadError` for a packed file that is damaged, and `IneffectiveOptionError` for a product where no weight is
    int8.
    """
    if not is_packed_path(path):
        require_no_product(path, product)
        return hf.load_model(path, dtype, on_progress)
    with open_packed(path, product) as weights:
        if dtype is not None:
            require_dtype(path, dtype, weights.dtype)
        return weights.load_all(on_progress)
