"""``moesys chat``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from moesys.cli.arguments import (
    Dtype,
    MaxNewTokens,
    MinP,
    ModelArgument,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    make_sampling,
)
from moesys.cli.memory_options import MemoryOptions, takes_memory_options


@takes_memory_options
def chat(
    memory: MemoryOptions,
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="A system message that opens the conversation.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Which of the model's chat templates.", show_default="default")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the conversation to remember, the answer included.",
            show_default="as many as the model was made for",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    dtype: Dtype = None,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends.

    A model without a chat template sees a plain transcript of `User:` and `Assistant:` turns.

    Example: `moesys chat runs/demo/export --temperature 0.7`
    """
    from moesys.checkpoint import read_layout
    from moesys.cli.opening import open_behind_bar
    from moesys.errors import GenerationError
    from moesys.inference import ChatFormat, ChatSession
    from moesys.inference.chat import choose_answer_tokens, choose_context

    sampling = make_sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    chat_format = ChatFormat.load(model, template)
    num_positions = choose_context(context, read_layout(model).decoder.position_limit)
    answer_tokens = choose_answer_tokens(max_new_tokens, num_positions)
    with open_behind_bar(model, dtype, memory, memory.make_request(num_positions, 1)) as run:
        opened = run.opened
        run.report_plan()
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
            answer_tokens,
            system,
            opened.stop_ids,
            context=num_positions,
            prefill_tokens=opened.prefill_tokens,
            on_first_token=run.note_first_token,
        )
        while line := _read_line():
            try:
                pieces = session.answer(line)
            except GenerationError as error:
                print(f"error: {error}", file=sys.stderr)
                continue
            run.begin()
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            print(session.describe_last(), file=sys.stderr)
            assert session.last_stats is not None
            run.report_text(session.last_stats)
            run.report_traffic()


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
