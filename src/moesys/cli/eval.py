"""``moesys eval``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moesys.cli.arguments import PRODUCT_HELP, Dtype, ModelArgument, parse_product


def evaluate(
    model: ModelArgument,
    data: Annotated[
        str, typer.Option(help="stdlib, a file, a folder, hf:NAME or hf:NAME:CONFIG.")
    ] = "stdlib",
    format: Annotated[
        str | None,
        typer.Option(help="text, jsonl, parquet or chat.", show_default="by the file name's ending"),
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="The field that holds the text of records.", show_default="text")
    ] = None,
    chat_answers: Annotated[
        str | None,
        typer.Option(
            help="all, or the last of each conversation: which answers of chats are scored.",
            show_default="all",
        ),
    ] = None,
    heldout_fraction: Annotated[
        float | None,
        typer.Option(
            help="Score only what training with this data.heldout_fraction keeps away.", show_default="all"
        ),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens by which windows advance.", show_default="half the context")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Score whole documents of at most this many tokens together, but the shortest of all in any case.",
            show_default="all",
        ),
    ] = None,
    dtype: Dtype = None,
    product: Annotated[
        str | None,
        typer.Option(help=PRODUCT_HELP, show_default="w8"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure loss and bits per byte on held-out text, each document seen alone; of chats, on the answers.

    Without options it scores the held-out files of the default corpus.

    Example: `moesys eval runs/demo/export --data README.md`
    """
    from dataclasses import asdict

    from moesys.checkpoint import load_text_model
    from moesys.cli.progress import show_bytes
    from moesys.config import build_config
    from moesys.env import read_cache_dir
    from moesys.training import evaluate_text

    int8_product = parse_product(product)
    options = {
        "source": data,
        "format": format,
        "text_field": text_field,
        "chat_answers": chat_answers,
        "heldout_fraction": heldout_fraction,
    }
    source = build_config({"data": {key: value for key, value in options.items() if value is not None}}).data
    if data == "stdlib" and heldout_fraction is None:
        heldout_fraction = source.heldout_fraction
    with show_bytes("loading") as on_progress:
        loaded = load_text_model(model, dtype, on_progress, product=int8_product)
    evaluation = evaluate_text(
        loaded.decoder, loaded.tokenizer, source, heldout_fraction, stride, max_tokens, read_cache_dir()
    )
    if as_json:
        print(json.dumps(asdict(evaluation)))
        return
    print(
        f"{evaluation.bits_per_byte:.4f} bits/byte, loss {evaluation.loss:.4f} nats/token "
        f"({evaluation.num_targets} tokens, {evaluation.num_bytes} bytes)"
    )
