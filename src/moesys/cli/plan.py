"""``moesys plan``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from moesys.cli.memory_options import DeviceMemory, HostMemory, MemoryOptions


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model folder in Hugging Face layout, a packed file, or org/model[@revision] on the hub.",
        ),
    ],
    host_memory: HostMemory = None,
    device_memory: DeviceMemory = None,
    goal: Annotated[
        str, typer.Option(help="latency: one sequence at a time; throughput: up to 32 together.")
    ] = "latency",
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a sequence at most.", show_default="4096, or the model's context"
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences that are open at once.", show_default="as serves the goal"),
    ] = None,
    routing: Annotated[
        Path | None,
        typer.Option(
            help="What --record wrote in a run of this model, for the share of experts that will be read.",
            show_default="uniform routing",
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="A file that `moesys doctor` wrote.", show_default="the saved one, or measured now"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how a model would run within a budget of RAM, how fast, and what more memory would buy.

    Reads headers only. The first time on a machine it measures it, in less than a minute.

    Example: `moesys plan MODEL --host-memory 8GiB --goal throughput`
    """
    from moesys.cli.arguments import find_model
    from moesys.cli.plan_options import PlanOptions, make_plans
    from moesys.cli.plan_report import encode_plans, render_plans

    budget = MemoryOptions(host_memory, device_memory).budget
    plans = make_plans(find_model(model), PlanOptions(budget, goal, context, batch, routing, profile))
    if as_json:
        print(json.dumps(encode_plans(plans), ensure_ascii=False))
    else:
        sys.stdout.write("\n".join(render_plans(plans)) + "\n")
