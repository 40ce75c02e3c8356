"""From the prompts of a file to those of a batch, and the settings that its results depend on."""

from __future__ import annotations

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
from moesys.inference.model_digest import digest_model
from moesys.inference.prompt_file import PromptLine, report_problems
from moesys.inference.sampling import SamplingParams, derive_seed
from moesys.kernels import Int8Product


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
    model: Path,
    max_new_tokens: int | None,
    sampling: SamplingParams,
    stop: Sequence[str],
    dtype: str | None,
    product: Int8Product | None,
) -> dict[str, Any]:
    """Returns, as JSON values, all that a prompt's text depends on beside itself: neither budgets nor how many texts
    are written at once."""
    return {
        "model": digest_model(model),
        "dtype": dtype,
        "product": (product or Int8Product.W8).value,
        "max_new_tokens": max_new_tokens,
        "stop": list(stop),
        **asdict(sampling),
    }
