"""From the prompts of a file to those of a batch, and the settings that its results depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moesys.data import Tokenizer
from moesys.errors import GenerationError
from moesys.inference.batch import BatchPrompt
from moesys.inference.continuation import require_new_tokens
from moesys.inference.engine import require_positions
from moesys.inference.generate import choose_new_tokens, encode_prompt
from moesys.inference.prompt_file import PromptLine, report_problems
from moesys.inference.sampling import SamplingParams, derive_seed

_MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "*.safetensors")


def plan_prompts(
    path: Path,
    lines: Sequence[PromptLine],
    tokenizer: Tokenizer,
    position_limit: int,
    max_new_tokens: int | None,
    sampling: SamplingParams,
) -> list[BatchPrompt]:
    """Tokenises the prompts of ``path``, each with randomness of its own.

    max_new_tokens: of lines that do not say; None for what `choose_new_tokens` says.

    Raises `GenerationError` for fewer than one new token, and one that lists every line that does not fit the model's
    positions.
    """
    if max_new_tokens is not None:
        require_new_tokens(max_new_tokens)
    prompts: list[BatchPrompt] = []
    problems: list[str] = []
    for line in lines:
        token_ids = encode_prompt(tokenizer, line.prompt)
        num_new = max_new_tokens if line.max_new_tokens is None else line.max_new_tokens
        if num_new is None:
            num_new = choose_new_tokens(len(token_ids), position_limit)
        try:
            require_positions(len(token_ids) + num_new, position_limit)
        except GenerationError as error:
            problems.append(f"line {line.number}: {error}")
        own = replace(sampling, seed=derive_seed(sampling.seed, line.seed_name))
        prompts.append(BatchPrompt(token_ids, num_new, own))
    report_problems(path, problems)
    return prompts


def describe_settings(
    model: Path, max_new_tokens: int | None, sampling: SamplingParams, stop: Sequence[str], dtype: str | None
) -> dict[str, Any]:
    """Returns, as JSON values, all that a prompt's text depends on beside itself: neither budgets nor how many texts
    are written at once."""
    return {
        "model": _digest_files(model),
        "dtype": dtype,
        "max_new_tokens": max_new_tokens,
        "stop": list(stop),
        **asdict(sampling),
    }


def _digest_files(model: Path) -> str:
    """A digest of the names, sizes and times of change of a model's files."""
    files = (
        [model] if model.is_file() else [path for name in _MODEL_FILES for path in sorted(model.glob(name))]
    )
    described = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]
