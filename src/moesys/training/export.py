"""From a run to a model folder that others load: weights, tokenizer, generation config, model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moesys.checkpoint import (
    AS_PUBLISHED,
    CurvePoint,
    FileSystem,
    ModelCard,
    RunState,
    Selection,
    StorageForm,
    Verification,
    WrittenFile,
    load_newest_checkpoint,
    parse_dtype,
    require_new_folder,
    save_model,
    verify_export,
    write_new_folder,
)
from moesys.config import Config, dump_toml
from moesys.data import Tokenizer
from moesys.errors import ModelFormatError
from moesys.models import Decoder
from moesys.training.build import build_decoder_config, compute_dtype
from moesys.training.keys import name_misfits
from moesys.training.metrics import RunMetrics, read_metrics
from moesys.training.origin import Origin
from moesys.training.run_directory import RunDirectory
from moesys.units import format_bytes, format_count

_CURVE_POINTS = 20
_MODEL_PREFIX = "model."


@dataclass(frozen=True)
class ExportedRun:
    """What was written."""

    family: str
    step: int
    num_parameters: int
    num_bytes: int
    verification: Verification | None = None

    def describe(self) -> str:
        """One line for people."""
        return f"step {self.step}, {format_count(self.num_parameters)} parameters, {format_bytes(self.num_bytes)}"


class _Weights(NamedTuple):
    """As what the weights are written, and whether they are read back."""

    dtype: torch.dtype
    form: StorageForm
    verify: bool


class _TokenKeys(NamedTuple):
    """What says which tokens begin and end texts: keys of ``config.json`` and of ``generation_config.json``."""

    config: dict[str, Any]
    generation: dict[str, Any] | None


def export_run(
    path: Path,
    target: Path,
    dtype: str | None,
    on_damage: Callable[[str], None],
    files: FileSystem | None = None,
    *,
    form: StorageForm = AS_PUBLISHED,
    verify: bool = False,
) -> ExportedRun:
    """Writes the newest intact checkpoint of a run into the folder ``target``, which must not exist or be empty.

    dtype: ``fp32``, ``bf16`` or None for the run's own. form: how the weights are cut into tensors and files. verify:
    also read the result back, and compare every tensor and the logits of a prompt. The folder appears under its name
    when it is complete and on the disk.
    Memory: the exported weights and one tensor; with ``verify`` the weights a second time. Raises `ConfigError`,
    `ModelFormatError` or `CheckpointError`.
    """
    run = RunDirectory.open(path)
    config = run.load_config()
    target = target.resolve()
    require_new_folder(target)
    wanted = compute_dtype(config) if dtype is None else parse_dtype(dtype)
    state = load_newest_checkpoint(
        run.checkpoints_folder,
        on_damage=on_damage,
        selection=Selection(lambda name: name.startswith(_MODEL_PREFIX), wanted),
    )
    files = files or FileSystem()
    weights = _Weights(wanted, form, verify)
    with write_new_folder(target, files) as draft:
        return _write_folder(run, config, state, draft, target.name, weights, files)


def _write_folder(
    run: RunDirectory,
    config: Config,
    state: RunState,
    folder: Path,
    name: str,
    weights: _Weights,
    files: FileSystem,
) -> ExportedRun:
    tokenizer = run.load_tokenizer()
    origin = None if config.model.init is None else Origin.open(run.origin_folder)
    model = _build_model(config, tokenizer.vocab_size, state, origin)
    tokens = _choose_token_keys(tokenizer, origin)
    try:
        exported = save_model(
            model,
            folder,
            weights.dtype,
            tokens.config,
            files,
            family=weights.form.arrange(model.config, None if origin is None else origin.layout.family),
            max_shard_bytes=weights.form.max_shard_bytes,
        )
    except ModelFormatError as error:
        raise ModelFormatError(name_misfits(str(error))) from error
    contents = dict(tokenizer.render_files())
    if tokens.generation is not None:
        contents["generation_config.json"] = f"{json.dumps(tokens.generation, indent=2)}\n".encode()
    written = {
        **exported.files,
        **{name: _write_contents(folder / name, data, files) for name, data in contents.items()},
    }
    card = ModelCard(
        name=name,
        architecture=exported.family.architecture,
        config=model.config,
        num_parameters=model.count_parameters(),
        data_source=config.data.source,
        curve=_thin_curve(read_metrics(run.metrics_file)),
        config_toml=dump_toml(config),
        environment=run.read_environment(),
        files=written,
    )
    _write_contents(folder / "README.md", card.render().encode(), files)
    num_bytes = sum(file.size_bytes for file in written.values())
    verification = verify_export(model, exported.family, folder, weights.dtype) if weights.verify else None
    return ExportedRun(
        exported.family.model_type, state.step, model.count_parameters(), num_bytes, verification
    )


def _write_contents(path: Path, contents: bytes, files: FileSystem) -> WrittenFile:
    path.parent.mkdir(exist_ok=True)
    return files.write_new_file(path, [contents], len(contents))


def _choose_token_keys(tokenizer: Tokenizer, origin: Origin | None) -> _TokenKeys:
    """Keeps what the model started with; one that started from nothing has one special token for all."""
    if origin is not None:
        return _TokenKeys(origin.token_ids, origin.generation_keys)
    end_id = tokenizer.end_of_text_id
    token_ids = {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id}
    return _TokenKeys(token_ids, {**token_ids, "do_sample": True, "temperature": 0.8})


def _build_model(config: Config, vocab_size: int, state: RunState, origin: Origin | None) -> Decoder:
    """Builds a decoder around the loaded tensors, without copying them."""
    with torch.device("meta"):
        if origin is None:
            model = Decoder(build_decoder_config(config.model, vocab_size, config.data.sequence_length))
        else:
            model = origin.make_model(config.model.balance_bias_rate)
    tensors = {name.removeprefix(_MODEL_PREFIX): tensor for name, tensor in state.tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def _thin_curve(metrics: RunMetrics) -> list[CurvePoint]:
    """Returns about twenty evenly spaced points of the training curve, and every evaluation."""
    stride = max(1, len(metrics.train) // _CURVE_POINTS)
    train = metrics.train[::-1][::stride][::-1]
    points = [CurvePoint(m.step, m.tokens, m.bits_per_byte, None) for m in train]
    points += [CurvePoint(m.step, m.tokens, None, m.heldout_bits_per_byte) for m in metrics.evaluations]
    return sorted(points, key=lambda point: point.step)
