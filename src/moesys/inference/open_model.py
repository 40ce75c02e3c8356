"""A model opened for writing text: resident, or within a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from moesys.checkpoint import load_text_model, read_text_tools, resolve_model
from moesys.data import Tokenizer
from moesys.errors import IneffectiveOptionError
from moesys.inference.continuation import Stop
from moesys.inference.engine import Engine
from moesys.inference.generate import PREFILL_TOKENS, Generation, generate
from moesys.inference.offload import OffloadedModel, Watch, load_offloaded
from moesys.inference.offload_plan import OffloadRequest, require_stored_dtype
from moesys.inference.sampling import SamplingParams
from moesys.kernels import Int8Product


@dataclass(frozen=True)
class OpenModel:
    """An engine with what turns text into tokens and back.

    prefill_tokens:  of a prompt in one pass, at most.
    offloaded:       None where all weights are in memory.
    """

    engine: Engine
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    prefill_tokens: int = PREFILL_TOKENS
    offloaded: OffloadedModel | None = None

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Continues a text. Iterate over the result for pieces of text.

        max_new_tokens: None writes 128, or fewer where the model's context leaves less. stop: the text ends before the
        first of these strings. Raises `GenerationError` for what cannot be done.
        """
        return generate(
            self.engine,
            self.tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=Stop(stop, self.stop_ids),
            prefill_tokens=self.prefill_tokens,
        )


def load(
    model: str | Path,
    *,
    dtype: str | None = None,
    host_memory: str | None = None,
    context: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> AbstractContextManager[OpenModel]:
    """Opens a model for writing text: ``with moesys.load("org/model") as model: print(*model.generate("Once"))``.

    model:        a folder in Hugging Face layout, a packed file, or ``org/model[@revision]`` on the hub.
    dtype:        ``fp32``, ``bf16`` or None for the stored one.
    host_memory:  RAM to run within, such as ``8GiB`` or ``50%`` of the weights; None holds all weights.
    context:      tokens of a text at most, for which a budget has room; None for the model's full context.
    on_progress:  gets (bytes read, bytes to read).

    Raises `MoesysError` for a model or a budget that cannot be used.
    """
    path = model if isinstance(model, Path) else resolve_model(model).folder
    request = None if host_memory is None else OffloadRequest(host_memory, context, batch_size=1)
    if context is not None and request is None:
        raise IneffectiveOptionError(
            f"context ({context}) has no effect without host_memory: keys and values grow as they are needed; drop it"
        )
    return open_model(path, dtype=dtype, request=request, on_progress=on_progress)


@contextmanager
def open_model(
    path: Path,
    *,
    dtype: str | None = None,
    product: Int8Product | None = None,
    request: OffloadRequest | None = None,
    watch: Watch | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[OpenModel]:
    """Opens a Hugging Face folder or a packed file.

    dtype:        ``fp32``, ``bf16`` or None for the stored one.
    product:      how int8 weights are multiplied; None for ``w8``.
    request:      the budget within which it runs; None holds all weights.
    watch:        what is noted of a run within a budget.
    on_progress:  gets (bytes read, bytes to read) while it is opened.

    Raises `ModelFormatError`, `DataError`, for budgets `ConfigError` or `GenerationError`, and
    `IneffectiveOptionError` for a dtype beside a budget, or something to note without one.
    """
    if request is None:
        if watch is not None:
            raise IneffectiveOptionError(
                f"{watch} has no effect without a budget: all weights are in memory then; give a request or drop it"
            )
        loaded = load_text_model(path, dtype, on_progress, product=product)
        yield OpenModel(Engine(loaded.decoder), loaded.tokenizer, loaded.stop_ids)
        return
    require_stored_dtype(path, dtype)
    tools = read_text_tools(path)
    with load_offloaded(path, request, product=product, watch=watch, on_progress=on_progress) as offloaded:
        tools.require_fit(offloaded.model.config.vocab_size)
        engine = Engine(offloaded.model, offloaded.execution, num_pages=offloaded.num_pages)
        yield OpenModel(engine, tools.tokenizer, tools.stop_ids, offloaded.plan.prefill_tokens, offloaded)
