"""A model folder opened for writing text: resident, or within a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moesys.checkpoint import load_text_model, read_text_tools
from moesys.data import Tokenizer
from moesys.errors import IneffectiveOptionError
from moesys.inference.engine import Engine
from moesys.inference.offload import OffloadedModel, load_offloaded


@dataclass(frozen=True)
class OpenModel:
    """An engine with what turns text into tokens and back.

    offloaded: None where all weights are in memory.
    """

    engine: Engine
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    offloaded: OffloadedModel | None = None


@contextmanager
def open_model(
    folder: Path,
    *,
    dtype: str | None = None,
    host_memory: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[OpenModel]:
    """Opens a Hugging Face folder.

    dtype:        ``fp32``, ``bf16`` or None for the stored one.
    host_memory:  the budget within which it runs, a size or a share of the weights; None holds all weights.
    on_progress:  gets (bytes read, bytes to read) while it is opened.

    Raises `ModelFormatError`, `DataError`, and for budgets `ConfigError` or `GenerationError`.
    """
    if host_memory is None:
        loaded = load_text_model(folder, dtype, on_progress)
        yield OpenModel(Engine(loaded.decoder), loaded.tokenizer, loaded.stop_ids)
        return
    if dtype is not None:
        raise IneffectiveOptionError(
            f"--dtype {dtype} has no effect with --host-memory, where experts are read as they are stored; export the "
            f"model first: moesys export {folder} --to DIR --dtype {dtype}"
        )
    tools = read_text_tools(folder)
    with load_offloaded(folder, host_memory, on_progress=on_progress) as offloaded:
        tools.require_fit(offloaded.model.config.vocab_size)
        engine = Engine(offloaded.model, offloaded.execution)
        yield OpenModel(engine, tools.tokenizer, tools.stop_ids, offloaded)
