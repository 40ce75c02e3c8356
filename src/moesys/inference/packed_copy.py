"""A packed copy of a model in a folder of the user's choice, made once and found again.

Packing takes minutes, so that whatever would make a run of the copy fail is looked for first, in headers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moesys.checkpoint import pack_model
from moesys.checkpoint.hf import open_unread_model
from moesys.checkpoint.offloaded import require_no_product
from moesys.checkpoint.packed_form import PackedForm
from moesys.checkpoint.packed_outline import PackedOutline, PackedTensor, make_outline
from moesys.errors import IneffectiveOptionError, ModelFormatError
from moesys.inference.model_digest import digest_model
from moesys.inference.offload_plan import ModelSize, OffloadRequest, require_room, require_stored_dtype
from moesys.kernels import Int8Product


def find_packed_copy(
    model: Path,
    folder: Path,
    request: OffloadRequest,
    *,
    dtype: str | None = None,
    product: Int8Product | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Returns the packed copy of a model folder in ``folder``, made now where there is none of its files as they are.

    request, dtype, product: with which the copy shall run. ``on_progress`` gets (bytes read, bytes to read).

    Raises `IneffectiveOptionError` for a model that is a packed file already and for a dtype or product that a copy
    does not have, `GenerationError` or `ConfigError` for a budget in which it would not run, and what packing raises.
    """
    if model.is_file():
        raise IneffectiveOptionError(
            f"--offload-dir {folder} has no effect on {model}, which is packed already and is read where it lies; drop "
            "it, or copy the file there and name the copy"
        )
    require_stored_dtype(model, dtype)
    require_no_product(model, product)
    path = folder / f"{model.resolve().name}-{digest_model(model)}.safetensors"
    if path.exists():
        return path
    _require_room(model, request)
    folder.mkdir(parents=True, exist_ok=True)
    pack_model(model, path, on_progress=on_progress)
    return path


def _require_room(model: Path, request: OffloadRequest) -> None:
    with open_unread_model(model) as unread:
        outline = make_outline(unread.model.config, unread.dtype, PackedForm.FLOAT)
        section_bytes = _list_section_bytes(outline)
        if not section_bytes:
            raise ModelFormatError(
                f"{model} has no experts that could stay on the disk; run it without --host-memory"
            )
        core_bytes = sum(tensor.nbytes for tensor in outline.core.values())
        require_room(ModelSize.measure(unread.model.config, unread.dtype, core_bytes, section_bytes), request)


def _list_section_bytes(outline: PackedOutline) -> list[int]:
    of_layer = {
        layer_id: sum(part.num_bytes for part in PackedTensor.expert(layout).parts)
        for layer_id, layout in outline.layouts.items()
    }
    return [of_layer[layer_id] for layer_id, _ in outline.expert_keys]
