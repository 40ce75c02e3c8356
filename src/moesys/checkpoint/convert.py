"""From one Hugging Face folder to another: other numbers, other shards, other layout, the same model.

Weights pass through our decoder; tokenizer, chat templates and generation config are kept byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moesys.checkpoint.companion_files import read_companion_files
from moesys.checkpoint.files import DEFAULT, FileSystem
from moesys.checkpoint.hf import load_model, read_dtype
from moesys.checkpoint.layout import read_folder_layout
from moesys.checkpoint.model_writer import save_model
from moesys.checkpoint.new_folder import require_new_folder, write_new_folder
from moesys.checkpoint.storage_form import AS_PUBLISHED, StorageForm
from moesys.checkpoint.verification import (
    Verification,
    compare_logits,
    compare_weights,
    compute_prompt_logits,
    compute_written_logits,
)
from moesys.errors import ConfigError
from moesys.units import format_bytes, format_count

_KEPT_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "output_router_logits",
    "router_aux_loss_coef",
)
"""Keys of ``config.json`` that say nothing of the shape; what else a family does not write is left out."""


@dataclass(frozen=True)
class ConvertedModel:
    """What was written."""

    family: str
    num_parameters: int
    num_bytes: int
    verification: Verification | None

    def describe(self) -> str:
        """One line for people."""
        return f"{format_count(self.num_parameters)} parameters, {format_bytes(self.num_bytes)}"


def convert_model(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    form: StorageForm = AS_PUBLISHED,
    *,
    verify: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    files: FileSystem = DEFAULT,
) -> ConvertedModel:
    """Writes the model in ``source`` into the folder ``target``, which must not exist or be empty.

    dtype: of the weights; None for the source's own, to which quantised weights are decoded. verify: also read the
    result back, and compare every tensor and the logits of a prompt. ``on_progress`` gets (bytes read, bytes to read).

    Memory: the model and some tens of MiB; with ``verify`` where the dtype changes, the source's too, one after the
    other. Raises `ModelFormatError`, `ConfigError` or `CheckpointError`; ``target`` is then as it was.
    """
    _require_apart(source.resolve(), target.resolve())
    require_new_folder(target)
    layout = read_folder_layout(source)
    family = form.arrange(layout.decoder, layout.family)
    own_dtype = read_dtype(layout.keys)
    dtype = dtype or own_dtype
    original = compute_prompt_logits(load_model(source)) if verify and dtype != own_dtype else None
    model = load_model(source, dtype, on_progress)
    num_parameters = model.count_parameters()
    kept = {key: layout.keys[key] for key in _KEPT_KEYS if key in layout.keys}
    with write_new_folder(target, files) as draft:
        exported = save_model(
            model, draft, dtype, kept, files, family=family, max_shard_bytes=form.max_shard_bytes
        )
        num_bytes = sum(file.size_bytes for file in exported.files.values())
        for name, contents in read_companion_files(source).items():
            (draft / name).parent.mkdir(exist_ok=True)
            num_bytes += files.write_new_file(draft / name, [contents], len(contents)).size_bytes
        verification = None
        if verify:
            num_tensors = compare_weights(model, family, draft, dtype)
            expected = compute_written_logits(model, family, dtype)
            del model
            verification = compare_logits(expected, draft, num_tensors, original)
    return ConvertedModel(family.model_type, num_parameters, num_bytes, verification)


def _require_apart(source: Path, target: Path) -> None:
    if target == source or source in target.parents:
        raise ConfigError(f"{target} lies in the folder that is read, {source}; give another one with --to")
