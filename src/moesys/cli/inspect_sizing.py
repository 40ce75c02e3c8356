"""From the options of ``moesys inspect`` and ``moesys plan`` to what of a model fits where on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesys.checkpoint import Inventory, ModelInventory, Part, parse_dtype, read_inventory
from moesys.errors import ConfigError, IneffectiveOptionError
from moesys.inference.step_memory import compute_step_bytes
from moesys.planning.budget import Budget, parse_budget
from moesys.planning.footprint import (
    Footprint,
    compute_kv_bytes_per_token,
    compute_state_bytes,
    round_to_pages,
)
from moesys.planning.machine import read_device_bytes, read_ram_bytes
from moesys.planning.placement import Placement, place
from moesys.planning.plan import PASS_TOKENS

_DEFAULT_CONTEXT_TOKENS = 4096
_DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class SizingOptions:
    """As they were given; None where they were not."""

    device_memory: str | None
    host_memory: str | None
    context: int | None
    dtype: str | None

    def list_given(self) -> list[str]:
        """Returns the names of the options that were given."""
        values = {
            "--device-memory": self.device_memory,
            "--host-memory": self.host_memory,
            "--context": self.context,
            "--dtype": self.dtype,
        }
        return [name for name, value in values.items() if value is not None]


@dataclass(frozen=True)
class Sizing:
    """A model that moesys knows, what it needs in memory, and what of that fits where.

    context_tokens:  of the sequence that there is room for.
    pass_tokens:     of a prompt that are computed together.
    """

    model: ModelInventory
    footprint: Footprint
    placement: Placement
    context_tokens: int
    pass_tokens: int

    def count_step_bytes(self, num_tokens: int, num_sequences: int) -> int:
        """Returns what computing a step of so many tokens takes."""
        return _count_step_bytes(self.model, num_tokens, self.context_tokens, num_sequences)

    @property
    def dtype(self) -> str:
        """Of the weights in memory."""
        name = str(self.model.loaded_dtype).removeprefix("torch.")
        return _DTYPE_NAMES.get(name, name)


def read_sized(folder: Path, options: SizingOptions) -> tuple[Inventory, Sizing | None]:
    """Reads the headers of a folder and sizes its model; None for one that moesys does not know.

    Raises `ModelFormatError` for a folder that cannot be read, and `ConfigError` for an option that cannot be used or
    would change nothing.
    """
    dtype = None if options.dtype is None else parse_dtype(options.dtype)
    inventory = read_inventory(folder, dtype)
    if inventory.model is None:
        if given := options.list_given():
            raise IneffectiveOptionError(
                f"{', '.join(given)} has no effect on a model that moesys cannot size; drop it. {inventory.obstacle}"
            )
        return inventory, None
    footprint = _measure_footprint(inventory.model)
    budgets = _read_budgets(options, footprint)
    context_tokens = _choose_context(inventory.model, options.context)
    pass_tokens = min(PASS_TOKENS[0], context_tokens)
    step_bytes = _count_step_bytes(inventory.model, pass_tokens, context_tokens, num_sequences=1)
    placement = place(footprint, budgets, round_to_pages(context_tokens), step_bytes)
    return inventory, Sizing(inventory.model, footprint, placement, context_tokens, pass_tokens)


def _measure_footprint(model: ModelInventory) -> Footprint:
    return Footprint(
        core_bytes=sum(size.loaded_bytes for part, size in model.parts.items() if part is not Part.EXPERTS),
        section_bytes=tuple(
            layer.each.loaded_bytes for layer in model.experts for _ in range(layer.num_experts)
        ),
        kv_bytes_per_token=compute_kv_bytes_per_token(model.config.mixers, model.loaded_dtype.itemsize),
        state_bytes=compute_state_bytes(model.config.mixers),
    )


def _count_step_bytes(model: ModelInventory, num_tokens: int, context_tokens: int, num_sequences: int) -> int:
    return compute_step_bytes(
        model.config, num_tokens, context_tokens, model.loaded_dtype.itemsize, num_sequences
    )


def _read_budgets(options: SizingOptions, footprint: Footprint) -> list[Budget]:
    """Returns a budget for each tier of this machine; what was not given is all that there is."""
    device, host = options.device_memory, options.host_memory
    device_bytes = read_device_bytes()
    if device_bytes is not None:
        return [
            _read_budget(device, "--device-memory", "GPU memory", device_bytes, footprint),
            _read_budget(host, "--host-memory", "RAM", read_ram_bytes(), footprint),
        ]
    if device is not None and host is not None:
        raise ConfigError(
            f"--device-memory ({device}) and --host-memory ({host}) both name the RAM of a machine without a GPU; "
            "give one of them"
        )
    option = "--host-memory" if device is None else "--device-memory"
    return [_read_budget(device or host, option, "RAM", read_ram_bytes(), footprint)]


def _read_budget(
    text: str | None, option: str, tier: str, machine_bytes: int, footprint: Footprint
) -> Budget:
    if text is None:
        return Budget(f"{tier} (this machine's)", machine_bytes)
    return parse_budget(text, option, tier, footprint.weight_bytes)


def _choose_context(model: ModelInventory, asked: int | None) -> int:
    limit = model.config.position_limit
    if asked is not None and asked > limit:
        raise ConfigError(f"--context ({asked}) must not exceed what the model was made for, {limit} tokens")
    return asked or min(_DEFAULT_CONTEXT_TOKENS, limit)
