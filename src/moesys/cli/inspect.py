"""``moesys inspect``."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesys.cli.arguments import find_model

if TYPE_CHECKING:
    from moesys.checkpoint import Inventory, ModelInventory, WeightCheck
    from moesys.cli.inspect_report import Report
    from moesys.planning import Budget, Footprint, Placement

DEFAULT_CONTEXT_TOKENS = 4096

DeviceMemory = Annotated[
    str | None,
    typer.Option(
        help="Budget of GPU memory, or of RAM without a GPU: a size (8GiB) or a share of the weights (50%).",
        show_default="all there is",
    ),
]
HostMemory = Annotated[
    str | None, typer.Option(help="Budget of RAM: a size or a share.", show_default="all there is")
]


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model folder in Hugging Face layout, or org/model[@revision] on the hub."
        ),
    ],
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of KV cache to plan for.", show_default="4096, or the model's context"
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32 or bf16: as what it would be loaded.", show_default="as stored")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read all weights and look for NaN and Inf.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a checkpoint is, how large its parts are, and what of it fits where.

    Reads headers only, unless told to `--check`, which exits with 1 when a weight is not finite.

    Example: `moesys inspect runs/demo/export --host-memory 8GiB`
    """
    with _leave_garbage():
        folder = find_model(model)
        report = _report(folder, device_memory, host_memory, context, dtype)
    if not as_json:
        print("\n".join(report.render_text()))
    found = _check(folder) if check else None
    if as_json:
        print(json.dumps(report.render_json(found), ensure_ascii=False))
    elif found is not None:
        from moesys.cli.inspect_report import render_check

        print("\n".join(render_check(found)))
    if found is not None and found.found:
        raise typer.Exit(1)


@contextmanager
def _leave_garbage() -> Iterator[None]:
    """Collects no garbage inside: among a hundred thousand records without a cycle, looking takes half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _report(
    folder: Path, device_memory: str | None, host_memory: str | None, context: int | None, dtype: str | None
) -> Report:
    from moesys.checkpoint import parse_dtype, read_inventory
    from moesys.cli.inspect_report import Report, Sizing

    inventory = read_inventory(folder, None if dtype is None else parse_dtype(dtype))
    if inventory.model is None:
        options = {
            "--device-memory": device_memory, "--host-memory": host_memory, "--context": context, "--dtype": dtype
        }  # fmt: skip
        _refuse_options(inventory, [name for name, value in options.items() if value is not None])
        return Report(inventory)
    footprint = _measure_footprint(inventory.model)
    budgets = _read_budgets(device_memory, host_memory, footprint)
    placement = _place(inventory.model, footprint, budgets, context)
    return Report(inventory, Sizing(inventory.model, footprint, placement))


def _refuse_options(inventory: Inventory, given: list[str]) -> None:
    from moesys.errors import IneffectiveOptionError

    if given:
        raise IneffectiveOptionError(
            f"{', '.join(given)} has no effect on a model that moesys cannot size; drop it. {inventory.obstacle}"
        )


def _measure_footprint(model: ModelInventory) -> Footprint:
    from moesys.checkpoint import Part
    from moesys.planning import Footprint, compute_kv_bytes_per_token

    return Footprint(
        core_bytes=sum(size.loaded_bytes for part, size in model.parts.items() if part is not Part.EXPERTS),
        section_bytes=tuple(
            layer.each.loaded_bytes for layer in model.experts for _ in range(layer.num_experts)
        ),
        kv_bytes_per_token=compute_kv_bytes_per_token(model.config.mixers, model.loaded_dtype.itemsize),
    )


def _read_budgets(device: str | None, host: str | None, footprint: Footprint) -> list[Budget]:
    """Returns a budget for each tier of this machine; what was not given is all that there is."""
    from moesys.errors import ConfigError
    from moesys.planning import Budget, parse_budget, read_device_bytes, read_ram_bytes

    device_bytes = read_device_bytes()
    if device_bytes is None and device is not None and host is not None:
        raise ConfigError(
            f"--device-memory ({device}) and --host-memory ({host}) both name the RAM of a machine without a GPU; "
            "give one of them"
        )
    tiers = [("--device-memory", device, "GPU memory", device_bytes), ("--host-memory", host, "RAM", None)]
    if device_bytes is None:
        option = "--host-memory" if device is None else "--device-memory"
        tiers = [(option, host or device, "RAM", None)]
    return [
        Budget(f"{tier} (this machine's)", there_is or read_ram_bytes())
        if text is None
        else parse_budget(text, option, tier, footprint.weight_bytes)
        for option, text, tier, there_is in tiers
    ]


def _place(
    model: ModelInventory, footprint: Footprint, budgets: list[Budget], context: int | None
) -> Placement:
    from moesys.errors import ConfigError
    from moesys.planning import place

    limit = model.config.position_limit
    if context is not None and context > limit:
        raise ConfigError(
            f"--context ({context}) must not exceed what the model was made for, {limit} tokens"
        )
    return place(footprint, budgets, context or min(DEFAULT_CONTEXT_TOKENS, limit))


def _check(folder: Path) -> WeightCheck:
    from moesys.checkpoint import check_weights
    from moesys.cli.progress import show_bytes

    with show_bytes("checking") as on_progress:
        return check_weights(folder, on_progress)
