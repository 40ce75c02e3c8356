"""Model folders in Hugging Face layout, read into our decoder.

Names and shapes are checked against the headers of the files before any weight has memory; then every tensor is
streamed into its place. Peak memory is the model and some tens of MiB. No code from a checkpoint is ever run, and what
a folder says is believed only where nothing contradicts it.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesys.checkpoint.model_files import (
    FileTensor,
    describe_problems,
    have_equal_bytes,
    open_model_files,
    read_json_object,
)
from moesys.checkpoint.name_pattern import summarise_names
from moesys.checkpoint.quantization import QUANTIZATION_KEY, Fp8Blocks, read_fp8_blocks
from moesys.checkpoint.read_progress import ReadProgress
from moesys.checkpoint.streaming import stream
from moesys.checkpoint.tensor_source import TensorSource, find_source, list_expected
from moesys.errors import ModelFormatError, MoesysError
from moesys.models import (
    FAMILIES,
    REFUSED,
    Decoder,
    DecoderConfig,
    Family,
    make_skeleton,
)
from moesys.moe import Router
from moesys.store import allocate_weight

_MAX_LAYERS = 10_000
_EMBEDDING_NAME = "model.embed_tokens.weight"
_HEAD_NAME = "lm_head.weight"


def load_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Decoder:
    """Loads a checkpoint folder into our decoder, for inference.

    dtype: of the weights; None keeps what ``config.json`` names, float32 where that is float16. Routers are float32
    always. FP8 and MXFP4 weights become ``dtype`` too: no kernel takes them as they are. ``on_progress`` gets (bytes
    read, bytes to read), of the weights without their scales.

    Raises `ModelFormatError` for a folder, family or tensor that does not fit; it lists all that are missing, not
    expected or of a wrong shape.
    """
    with open_unread_model(folder, dtype) as unread:
        return unread.load(on_progress=on_progress)


LeavesOut = Callable[[nn.Module], bool]
"""Whether a module's own weights stay unread."""


def _leave_out_nothing(module: nn.Module) -> bool:
    return False


@dataclass(frozen=True)
class UnreadModel:
    """A folder whose names and shapes fit its config, and of which nothing but headers was read.

    model:  without memory (the meta device); `load` fills it.
    dtype:  of its weights, routers excepted.
    """

    folder: Path
    family: Family
    model: Decoder
    dtype: torch.dtype
    tensors: Mapping[str, FileTensor]
    fp8: Fp8Blocks | None

    def find_sources(self) -> list[TensorSource]:
        """Returns where each of the model's tensors comes from, for the weights as they are now."""
        return find_sources(self.folder, self.family, self.model, self.tensors, self.fp8)

    def count_bytes(self, leaves_out: LeavesOut = _leave_out_nothing) -> int:
        """Returns what the weights and buffers that `load` reads take in memory."""
        total = 0
        for module in self.model.modules():
            if leaves_out(module):
                continue
            for parameter in module.parameters(recurse=False):
                total += parameter.numel() * _choose_dtype(module, parameter, self.dtype).itemsize
            total += sum(buffer.numel() * buffer.itemsize for buffer in module.buffers(recurse=False))
        return total

    def load(
        self,
        leaves_out: LeavesOut = _leave_out_nothing,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Decoder:
        """Reads the weights and returns the model, for inference; what is left out stays without memory."""
        _materialise(self.model, self.dtype, leaves_out)
        sources = [source for source in self.find_sources() if not source.stored.view.is_meta]
        _stream_sources(sources, on_progress)
        return self.model.eval().requires_grad_(False)


@contextmanager
def open_unread_model(folder: Path, dtype: torch.dtype | None = None) -> Iterator[UnreadModel]:
    """Gives a folder's model before any weight has memory; its files stay open inside.

    dtype: as in `load_model`. Raises `ModelFormatError` as it does.
    """
    keys = read_config_file(folder)
    family = find_family(keys)
    report_ignored_code(family, keys)
    fp8 = read_fp8_blocks(keys)
    with open_model_files(folder) as tensors:
        check_num_layers(keys, tensors)
        config = read_decoder_config(folder / "config.json", family, keys)
        config, tensors = resolve_head(config, tensors)
        model = build_on_meta(folder, family, config, tensors)
        unread = UnreadModel(folder, family, model, dtype or read_dtype(keys), tensors, fp8)
        # Only to refuse what does not fit before any weight has memory: sources point into the weights as they are now.
        unread.find_sources()
        yield unread


def read_config_file(folder: Path) -> dict[str, Any]:
    """Returns the keys of a folder's ``config.json``; raises `ModelFormatError` with what is missing."""
    path = folder / "config.json"
    if folder.is_file():
        raise ModelFormatError(
            f"{folder} is a file, and the folder of a Hugging Face checkpoint is needed here; a packed file can be "
            "run, evaluated and inspected; for all else give the folder that it was packed from"
        )
    if not folder.is_dir():
        raise ModelFormatError(f"{folder} is not a folder; give the folder of a Hugging Face checkpoint")
    if (folder / "config.toml").exists() and not path.exists():
        raise ModelFormatError(
            f"{folder} is a training run; export it first: moesys export {folder} --to DIR"
        )
    if not path.exists():
        raise ModelFormatError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    return read_json_object(path)


def find_family(keys: Mapping[str, Any]) -> Family:
    """Returns the family of a ``config.json``; raises `ModelFormatError` listing those that are supported.

    A family that moesys knows is computed by moesys' own code, also where ``auto_map`` names code of the checkpoint
    (see `report_ignored_code`).
    """
    model_type = str(keys.get("model_type", ""))
    families = {name: family for family in FAMILIES for name in family.model_types}
    if model_type in families:
        return families[model_type]
    if model_type in REFUSED:
        raise ModelFormatError(
            f"model_type {model_type!r} is not supported: {REFUSED[model_type]} (supported: {', '.join(families)})"
        )
    code = (
        "; its auto_map asks for code of the checkpoint, which moesys never runs"
        if "auto_map" in keys
        else ""
    )
    nearest = difflib.get_close_matches(model_type, families, n=1)
    hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
    raise ModelFormatError(
        f"model_type {model_type!r} is not supported (supported: {', '.join(families)}){hint}{code}"
    )


def report_ignored_code(family: Family, keys: Mapping[str, Any]) -> None:
    """Logs which code of the checkpoint is not run, where ``auto_map`` names any beside a family that moesys knows."""
    if keys.get("auto_map"):
        logging.getLogger("moesys").warning(
            "config.json names code of the checkpoint in auto_map (%r), which is ignored: moesys never runs it, and "
            "computes %s by its own",
            keys["auto_map"],
            family.model_type,
        )


def read_decoder_config(path: Path, family: Family, keys: Mapping[str, Any]) -> DecoderConfig:
    """Returns the model that the keys of ``config.json`` describe; raises `ModelFormatError` with the file's name."""
    keys = {name: value for name, value in keys.items() if name != QUANTIZATION_KEY}
    num_layers = keys.get("num_hidden_layers")
    if isinstance(num_layers, int) and num_layers > _MAX_LAYERS:
        raise ModelFormatError(f"{path} asks for {num_layers} layers; no model has more than {_MAX_LAYERS}")
    try:
        return family.read(keys)
    except MoesysError:
        raise
    except KeyError as error:
        raise ModelFormatError(f"{path} lacks the key {error} that a {family.model_type} needs") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
        raise ModelFormatError(f"{path} holds a value that no {family.model_type} has: {error}") from None


def check_num_layers(keys: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Refuses more layers than there can be, before anything is built for each of them."""
    num_layers = keys.get("num_hidden_layers")
    if isinstance(num_layers, int) and num_layers > len(tensors):
        raise ModelFormatError(
            f"config.json asks for {num_layers} layers, the files hold no more than {len(tensors)} tensors"
        )


def resolve_head(
    config: DecoderConfig, tensors: Mapping[str, FileTensor]
) -> tuple[DecoderConfig, Mapping[str, FileTensor]]:
    """Follows the files where ``tie_word_embeddings`` says that there is one table and they hold another thing.

    One table under the head's name is the embedding too; a head that differs from the embedding is a head of its own.
    """
    if not config.tie_embeddings or _HEAD_NAME not in tensors:
        return config, tensors
    others = {name: tensor for name, tensor in tensors.items() if name != _HEAD_NAME}
    head = tensors[_HEAD_NAME]
    if _EMBEDDING_NAME not in tensors:
        return config, {**others, _EMBEDDING_NAME: head}
    if have_equal_bytes(head, tensors[_EMBEDDING_NAME]):
        return config, others
    logging.getLogger("moesys").warning(
        "config.json says that the output head is the embedding, the files hold another one, which is used"
    )
    return replace(config, tie_embeddings=False), tensors


def build_on_meta(
    folder: Path, family: Family, config: DecoderConfig, tensors: Mapping[str, FileTensor]
) -> Decoder:
    """Builds the model without memory; refuses one that has more weights than the files could hold."""
    with refusing_odd_sizes(folder):
        model = make_skeleton(config)
        num_parameters = model.count_parameters()
    num_bytes = sum(tensor.span.num_bytes for tensor in tensors.values())
    if num_parameters > 2 * num_bytes:
        raise ModelFormatError(
            f"config.json asks for {num_parameters} weights, the files in {folder} hold {num_bytes} bytes; "
            "they do not belong together"
        )
    with refusing_odd_sizes(folder):
        # Only for what it raises: sizes that cannot be cut as the layout cuts them are first noticed here.
        family.list_tensors(model, tensors.keys())
    return model


@contextmanager
def refusing_odd_sizes(folder: Path) -> Iterator[None]:
    """Turns what torch raises for sizes that no tensor has, such as negative ones, into `ModelFormatError`."""
    try:
        yield
    except MoesysError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFormatError(f"{folder / 'config.json'} describes no model: {reason}") from None


def find_sources(
    folder: Path, family: Family, model: Decoder, tensors: Mapping[str, FileTensor], fp8: Fp8Blocks | None
) -> list[TensorSource]:
    """Returns where each of the model's tensors comes from; raises `ModelFormatError` listing all that does not fit."""
    sources: list[TensorSource] = []
    missing: list[str] = []
    misfits: list[str] = []
    used: set[str] = set()
    for stored in family.list_tensors(model, tensors.keys()):
        source = find_source(stored, tensors, fp8)
        if source is not None:
            sources.append(source)
            used.update(source.tensors)
            misfits += source.find_misfits()
            continue
        in_fp8 = stored.name in tensors and tensors[stored.name].record.dtype == "F8_E4M3"
        expected = list_expected(stored, fp8 if in_fp8 else None)
        used.update(expected)
        missing += [f"{name} {shape}" for name, shape in expected.items() if name not in tensors]
    surplus = [
        name
        for name in tensors.keys() - used
        if not family.layout.ignores(name, model.config.num_layers, tensors.keys())
    ]
    problems = [f"missing: {names}" for names in summarise_names(missing)]
    problems += [f"not expected: {names}" for names in summarise_names(surplus)]
    problems += misfits
    if problems:
        raise ModelFormatError(
            describe_problems(
                f"the tensors in {folder} do not fit its config.json ({family.model_type}; "
                f"{len(missing)} missing, {len(surplus)} not expected, {len(misfits)} do not fit)",
                problems,
            )
        )
    return sources


def _stream_sources(sources: list[TensorSource], on_progress: Callable[[int, int], None]) -> None:
    def first_span(source: TensorSource) -> tuple[str, int]:
        span = next(iter(source.tensors.values())).span
        return span.path.name, span.offset

    total = sum(next(iter(source.tensors.values())).span.num_bytes for source in sources)
    ordered = sorted(sources, key=first_span)
    pieces = (piece for source in ordered for piece in source.iterate_pieces())
    stream(pieces, ReadProgress(total, on_progress).add)


def read_dtype(keys: Mapping[str, Any]) -> torch.dtype:
    """Returns the dtype in which a checkpoint is loaded unless another is asked for."""
    name = keys.get("dtype") or keys.get("torch_dtype") or "float32"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float32}
    if not isinstance(name, str) or name not in dtypes:
        raise ModelFormatError(
            f"dtype {name!r} in config.json is not supported (supported: {', '.join(dtypes)})"
        )
    return dtypes[name]


def cast_outline(model: Decoder, dtype: torch.dtype) -> None:
    """Gives every parameter of a model without memory its final dtype."""
    _materialise(model, dtype, lambda module: True)


def _materialise(model: Decoder, dtype: torch.dtype, leaves_out: LeavesOut) -> None:
    """Allocates every parameter once, in its final dtype, and every buffer, as zeros of its own. What is left out takes
    its dtype and no memory."""
    for module in model.modules():
        is_left_out = leaves_out(module)
        for name, parameter in module.named_parameters(recurse=False):
            final = _choose_dtype(module, parameter, dtype)
            memory = (
                parameter.detach().to(final)
                if is_left_out
                else allocate_weight(tuple(parameter.shape), final)
            )
            setattr(module, name, nn.Parameter(memory, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if not is_left_out:
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def _choose_dtype(module: nn.Module, parameter: nn.Parameter, dtype: torch.dtype) -> torch.dtype:
    return parameter.dtype if isinstance(module, Router) else dtype
