"""From a run to a model folder that others load: weights, tokenizer, generation config, model card."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moesys.checkpoint import (
    CurvePoint,
    FileSystem,
    ModelCard,
    RunState,
    Selection,
    WrittenFile,
    load_newest_checkpoint,
    parse_dtype,
    save_model,
)
from moesys.config import Config, dump_toml
from moesys.errors import CheckpointError, ConfigError, ModelFormatError
from moesys.models import Decoder
from moesys.training.build import build_decoder_config, compute_dtype
from moesys.training.keys import name_misfits
from moesys.training.metrics import RunMetrics, read_metrics
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

    def describe(self) -> str:
        """One line for people."""
        return f"step {self.step}, {format_count(self.num_parameters)} parameters, {format_bytes(self.num_bytes)}"


def export_run(
    path: Path,
    target: Path,
    dtype: str | None,
    on_damage: Callable[[str], None],
    files: FileSystem | None = None,
) -> ExportedRun:
    """Writes the newest intact checkpoint of a run into the folder ``target``, which must not exist or be empty.

    dtype: ``fp32``, ``bf16`` or None for the run's own. The folder appears under its name when it is complete and on
    the disk.
    Memory: the exported weights and one tensor. Raises `ConfigError`, `ModelFormatError` or `CheckpointError`.
    """
    run = RunDirectory.open(path)
    config = run.load_config()
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; give another one with --to")
    wanted = compute_dtype(config) if dtype is None else parse_dtype(dtype)
    state = load_newest_checkpoint(
        run.checkpoints_folder,
        on_damage=on_damage,
        selection=Selection(lambda name: name.startswith(_MODEL_PREFIX), wanted),
    )
    files = files or FileSystem()
    draft = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
        exported = _write_folder(run, config, state, draft, target.name, wanted, files)
        files.fsync_directory(draft)
        if target.exists():
            target.rmdir()
        draft.rename(target)
        files.fsync_directory(target.parent)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return exported


def _write_folder(
    run: RunDirectory,
    config: Config,
    state: RunState,
    folder: Path,
    name: str,
    dtype: torch.dtype,
    files: FileSystem,
) -> ExportedRun:
    tokenizer = run.load_tokenizer()
    end_id = tokenizer.end_of_text_id
    model = _build_model(config, tokenizer.vocab_size, state)
    token_ids = {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id}
    try:
        exported = save_model(model, folder, dtype, token_ids, files)
    except ModelFormatError as error:
        raise ModelFormatError(name_misfits(str(error))) from error
    generation = {**token_ids, "do_sample": True, "temperature": 0.8}
    texts = {
        **tokenizer.render_files(),
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    written = {
        **exported.files,
        **{name: _write_text(folder / name, text, files) for name, text in texts.items()},
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
    _write_text(folder / "README.md", card.render(), files)
    num_bytes = sum(file.size_bytes for file in written.values())
    return ExportedRun(exported.family.model_type, state.step, model.count_parameters(), num_bytes)


def _write_text(path: Path, text: str, files: FileSystem) -> WrittenFile:
    contents = text.encode()
    return files.write_new_file(path, [contents], len(contents))


def _build_model(config: Config, vocab_size: int, state: RunState) -> Decoder:
    """Builds a decoder around the loaded tensors, without copying them."""
    with torch.device("meta"):
        model = Decoder(build_decoder_config(config.model, vocab_size, config.data.sequence_length))
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
