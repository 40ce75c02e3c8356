"""``moesys generate``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from moesys.cli.arguments import (
    Dtype,
    HostMemory,
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
    report_plan,
    report_traffic,
)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")] = "",
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: StopStrings = None,
    dtype: Dtype = None,
    host_memory: HostMemory = None,
) -> None:
    """Continue a text, written to the terminal as it comes.

    Example: `moesys generate runs/demo/export -p "def main():" -n 100 --temperature 0.7`
    """
    from moesys.cli.opening import open_behind_bar
    from moesys.inference import Stop
    from moesys.inference import generate as start_generation

    sampling = make_sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    with open_behind_bar(model, dtype, host_memory) as opened:
        report_plan(opened)
        generation = start_generation(
            opened.engine,
            opened.tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=Stop(stop or (), opened.stop_ids),
        )
        sys.stdout.write(prompt)
        for piece in generation:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        assert generation.stats is not None
        print(generation.stats.describe(), file=sys.stderr)
        report_traffic(opened)
