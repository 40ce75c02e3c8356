"""llama.cpp over a mapped GGUF file of the same weights; it reads what it touches, through the page cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_void_p
from typing import Any

import llama_cpp
import numpy as np

from decode_peers import UnavailableError
from decode_peers.traffic import Traffic
from decode_peers.workload import Phase, Task

LARGEST_BATCH = 512


@contextmanager
def open_system(variant: str, task: Task) -> Iterator[LlamaDecoding]:
    """``mmap`` only: what llama.cpp does unless told otherwise, and what a model larger than memory needs."""
    path = task.files.gguf(task.form)
    if not path.exists():
        raise UnavailableError(f"{path.name} is not there; it is written where gguf is installed")
    llama_cpp.llama_log_set(_silence, c_void_p())
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.use_mmap = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise UnavailableError(f"llama.cpp cannot load {path}")
    try:
        yield LlamaDecoding(model, task)
    finally:
        llama_cpp.llama_model_free(model)


@llama_cpp.llama_log_callback
def _silence(level: int, text: bytes, user_data: object) -> None:
    pass


class LlamaDecoding:
    """A context per phase: sequences side by side, logits of each one's last token."""

    def __init__(self, model: Any, task: Task) -> None:
        self._model = model
        self._task = task
        self._vocab_size = task.files.shape.vocab_size
        self._context: Any = None
        self._length = 0

    def begin(self, phase: Phase, prompts: Sequence[Sequence[int]]) -> list[int]:
        """See `Decoding`."""
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        self._context = self._make_context(phase)
        self._length = 0
        favourites: list[int] = []
        if phase.batch == 1:
            for start in range(0, phase.prompt_tokens, LARGEST_BATCH):
                favourites = self._run([prompts[0][start : start + LARGEST_BATCH]])
        else:
            favourites = self._run(prompts)
        return favourites

    def step(self, tokens: Sequence[int]) -> list[int]:
        """See `Decoding`."""
        return self._run([[token] for token in tokens])

    def mark(self) -> None:
        """See `Decoding`."""

    def count_traffic(self) -> Traffic | None:
        """See `Decoding`."""
        return None

    def _make_context(self, phase: Phase) -> Any:
        options = llama_cpp.llama_context_default_params()
        # llama.cpp cuts its context into equal parts for sequences, in steps of 256.
        options.n_ctx = phase.batch * (-(-phase.num_positions // 256) * 256)
        options.n_batch = options.n_ubatch = LARGEST_BATCH
        options.n_seq_max = phase.batch
        options.n_threads = options.n_threads_batch = self._task.threads
        context = llama_cpp.llama_init_from_model(self._model, options)
        if not context:
            raise UnavailableError("llama.cpp cannot make a context")
        return context

    def _run(self, tokens: Sequence[Sequence[int]]) -> list[int]:
        """Adds equally many tokens to each sequence."""
        batch = llama_cpp.llama_batch_init(sum(map(len, tokens)), 0, 1)
        last = []
        for sequence_id, new in enumerate(tokens):
            for offset, token in enumerate(new):
                place = batch.n_tokens
                batch.token[place] = token
                batch.pos[place] = self._length + offset
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = sequence_id
                batch.logits[place] = offset == len(new) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self._length += len(tokens[0])
        return [self._find_favourite(place) for place in last]

    def _find_favourite(self, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())
