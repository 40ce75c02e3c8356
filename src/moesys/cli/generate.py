"""``moesys generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesys.cli.arguments import (
    Dtype,
    MaxNewTokens,
    MinP,
    ModelArgument,
    RepetitionPenalty,
    Seed,
    StopStrings,
    Temperature,
    TopK,
    TopP,
    make_sampling,
)
from moesys.cli.memory_options import MemoryOptions, takes_memory_options

if TYPE_CHECKING:
    from moesys.inference import SamplingParams

_BATCH_PANEL = "Many prompts"


@takes_memory_options
def generate(
    memory: MemoryOptions,
    model: ModelArgument,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue.", show_default="nothing")
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help='Continue many texts: a file of lines like {"prompt": "..."}; "id" and "max_new_tokens" may follow.',
            show_default=False,
            rich_help_panel=_BATCH_PANEL,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where the results of --batch go, one line each as they finish, with the line and id of their prompt; "
            "what is there already is not done again.",
            show_default=False,
            rich_help_panel=_BATCH_PANEL,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Texts of --batch to write at once.",
            show_default="32, or what serves best within --host-memory",
            rich_help_panel=_BATCH_PANEL,
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: StopStrings = None,
    dtype: Dtype = None,
) -> None:
    """Continue a text, written to the terminal as it comes, or the texts of a file.

    Example: `moesys generate runs/demo/export -p "def main():" -n 100 --temperature 0.7`
    """
    sampling = make_sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if batch is not None:
        from moesys.cli.generate_batch import generate_batch

        generate_batch(
            model,
            batch,
            _require_output(batch, prompt, output),
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop or [],
            dtype=dtype,
            memory=memory,
        )
        return
    _refuse_batch_options(output, batch_size)
    _generate_one(model, prompt or "", max_new_tokens, sampling, stop or [], dtype, memory)


def _require_output(batch: Path, prompt: str | None, output: Path | None) -> Path:
    from moesys.errors import ConfigError, IneffectiveOptionError

    if prompt is not None:
        raise IneffectiveOptionError(
            f"--prompt has no effect with --batch, whose prompts are those of {batch}; drop one of them"
        )
    if output is None:
        raise ConfigError("--batch needs --output FILE for the results")
    if output.resolve() == batch.resolve():
        raise ConfigError(f"--output must be another file than --batch ({batch})")
    return output


def _refuse_batch_options(output: Path | None, batch_size: int | None) -> None:
    from moesys.errors import IneffectiveOptionError

    for name, value in (("--output", output), ("--batch-size", batch_size)):
        if value is not None:
            raise IneffectiveOptionError(f"{name} has no effect without --batch FILE; give that or drop it")


def _generate_one(
    model: Path,
    prompt: str,
    max_new_tokens: int | None,
    sampling: SamplingParams,
    stop: list[str],
    dtype: str | None,
    memory: MemoryOptions,
) -> None:
    from moesys.checkpoint import read_layout, read_text_tools
    from moesys.cli.opening import open_behind_bar
    from moesys.inference import Generation, Stop
    from moesys.inference.continuation import require_new_tokens
    from moesys.inference.engine import require_positions
    from moesys.inference.generate import choose_new_tokens, encode_prompt

    tools = read_text_tools(model)
    limit = read_layout(model).decoder.position_limit
    prompt_ids = encode_prompt(tools.tokenizer, prompt)
    if max_new_tokens is None:
        max_new_tokens = choose_new_tokens(len(prompt_ids), limit)
    require_new_tokens(max_new_tokens)
    require_positions(len(prompt_ids) + max_new_tokens, limit)
    request = memory.make_request(len(prompt_ids) + max_new_tokens, 1)
    with open_behind_bar(model, dtype, memory, request) as run:
        opened = run.opened
        run.report_plan()
        generation = Generation(
            opened.engine,
            opened.tokenizer,
            prompt_ids,
            max_new_tokens,
            sampling,
            Stop(stop, opened.stop_ids),
            prefill_tokens=opened.prefill_tokens,
            on_first_token=run.note_first_token,
        )
        run.begin()
        sys.stdout.write(prompt)
        for piece in generation:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        assert generation.stats is not None
        print(generation.stats.describe(), file=sys.stderr)
        run.report_text(generation.stats)
        run.report_traffic()
