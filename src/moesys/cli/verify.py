"""``moesys verify``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from moesys.cli.arguments import ModelArgument


def verify(
    model: ModelArgument,
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="The budget, such as 8GiB, or 50% of the weights.",
            show_default="what every token uses and half of the experts",
        ),
    ] = None,
    by_layer: Annotated[
        bool | None,
        typer.Option(
            "--by-layer/--whole",
            help="Hold each MoE layer against itself, or the whole model's logits against those of all in memory.",
            show_default="whole where it fits in the free memory",
        ),
    ] = None,
    transformers: Annotated[
        bool | None,
        typer.Option(
            "--transformers/--no-transformers",
            help="Compare logits with transformers' too.",
            show_default="where it is installed and takes MODEL",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check that a model within a budget of memory computes the same bits as with all its weights in memory.

    Fixed random tokens run with two, half and all of the experts that the budget holds, with half also while others are
    read on a guess. Exits with 1 on any difference.

    Example: `moesys verify MODEL --host-memory 8GiB`
    """
    from dataclasses import asdict

    from moesys.inference.compare_transformers import compare_with_transformers
    from moesys.inference.verify import verify_model

    def say(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout)

    check = verify_model(
        model, host_memory, by_layer=by_layer, on_stage=lambda stage: print(stage, file=sys.stderr)
    )
    say(
        "each MoE layer beside itself with all experts in memory:"
        if check.by_layer
        else "logits of the whole model:"
    )
    for comparison in check.comparisons:
        say(f"  {comparison.describe()}")
    peer = compare_with_transformers(model, is_wanted=transformers)
    say(peer.describe())
    is_ok = check.is_equal and peer.is_close is not False
    if as_json:
        print(json.dumps({"is_ok": is_ok, "equality": asdict(check), "transformers": asdict(peer)}))
    if not is_ok:
        raise typer.Exit(1)
