"""``moesys chat``."""

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
    Temperature,
    TopK,
    TopP,
    make_sampling,
    report_plan,
    report_traffic,
)


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="A system message that opens the conversation.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Which of the model's chat templates.", show_default="default")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    dtype: Dtype = None,
    host_memory: HostMemory = None,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends.

    A model without a chat template sees a plain transcript of `User:` and `Assistant:` turns.

    Example: `moesys chat runs/demo/export --temperature 0.7`
    """
    from moesys.cli.opening import open_behind_bar
    from moesys.inference import ChatFormat, ChatSession

    sampling = make_sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    chat_format = ChatFormat.load(model, template)
    with open_behind_bar(model, dtype, host_memory) as opened:
        report_plan(opened)
        if chat_format.template is None:
            print(
                "this model has no chat template: it sees a transcript of User: and Assistant: turns",
                file=sys.stderr,
            )
        session = ChatSession(
            opened.engine,
            opened.tokenizer,
            chat_format,
            sampling,
            max_new_tokens,
            system,
            opened.stop_ids,
        )
        while line := _read_line():
            for piece in session.answer(line):
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            print(session.describe_last(), file=sys.stderr)
            report_traffic(opened)


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
