"""transformers' OLMoE in bf16: in memory, or with accelerate's modules on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, OlmoeForCausalLM

from decode_peers.traffic import Traffic
from decode_peers.workload import Phase, Task

IN_MEMORY_SHARE = 0.57
"""Of the cap, for accelerate's modules in memory: loading one from the disk needs the rest."""


@contextmanager
def open_system(variant: str, task: Task) -> Iterator[TransformersDecoding]:
    """``resident`` or ``disk``."""
    options: dict[str, Any] = {}
    if variant == "disk":
        assert task.cap_bytes is not None
        options = {
            "device_map": "auto",
            "max_memory": {"cpu": int(IN_MEMORY_SHARE * task.cap_bytes)},
            "offload_folder": task.files.scratch(),
        }
    model = OlmoeForCausalLM.from_pretrained(task.files.folder, dtype=torch.bfloat16, **options).eval()
    yield TransformersDecoding(model)


class TransformersDecoding:
    """A model with its cache of keys and values; all sequences are equally long."""

    def __init__(self, model: OlmoeForCausalLM) -> None:
        self._model = model
        self._cache = DynamicCache()

    def begin(self, phase: Phase, prompts: Sequence[Sequence[int]]) -> list[int]:
        """See `Decoding`."""
        self._cache = DynamicCache()
        return self._run(torch.tensor(prompts))

    def step(self, tokens: Sequence[int]) -> list[int]:
        """See `Decoding`."""
        return self._run(torch.tensor(tokens)[:, None])

    def mark(self) -> None:
        """See `Decoding`."""

    def count_traffic(self) -> Traffic | None:
        """See `Decoding`."""
        return None

    @torch.inference_mode()
    def _run(self, token_ids: torch.Tensor) -> list[int]:
        output = self._model(token_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(dim=-1).tolist()
