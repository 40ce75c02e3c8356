"""The options of a run within a budget of memory, and those of other programs that mean the same.

They are one record, `MemoryOptions`; `takes_memory_options` gives a command all of them, each as an option of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from moesys.cli.arguments import PRODUCT_HELP
from moesys.errors import ConfigError, IneffectiveOptionError

if TYPE_CHECKING:
    from moesys.inference import OffloadRequest

_PANEL = "Memory"
_GPU_ONLY = (
    "it keeps weights off a GPU, and here everything computes on the CPU; use --host-memory SIZE, within which experts "
    "are kept in RAM"
)

HostMemory = Annotated[
    str | None,
    typer.Option(
        help="RAM to run within, such as 8GiB, or 50% of the weights; experts that do not fit are read from the disk "
        "when they are needed.",
        show_default="all that the model takes",
        rich_help_panel=_PANEL,
    ),
]

DeviceMemory = Annotated[
    str | None,
    typer.Option(help="Without a GPU the same as --host-memory.", show_default=False, rich_help_panel=_PANEL),
]


@dataclass(frozen=True)
class MemoryOptions:
    """As they were given on the command line."""

    host_memory: HostMemory = None
    device_memory: DeviceMemory = None
    offload_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for a packed copy of the model, made at the first run, from which experts are then read: a "
            "faster disk, or for checkpoints whose experts cannot be read one by one.",
            show_default="the model's own files are read",
            rich_help_panel=_PANEL,
        ),
    ] = None
    predict: Annotated[
        bool,
        typer.Option(
            "--predict",
            help="Read what the next layer's router names early while the disk is idle.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify", help="Do not check what is read against checksums.", rich_help_panel=_PANEL
        ),
    ] = False
    product: Annotated[
        str | None,
        typer.Option(help=PRODUCT_HELP, show_default="w8", rich_help_panel=_PANEL),
    ] = None
    usage: Annotated[
        Path | None,
        typer.Option(
            help="File of how often experts are used: begin with those, and write it at the end.",
            show_default="none",
            rich_help_panel=_PANEL,
        ),
    ] = None
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write what was computed and read when, for ui.perfetto.dev (JSON).",
            show_default="none",
            rich_help_panel=_PANEL,
        ),
    ] = None
    timeline: Annotated[
        Path | None,
        typer.Option(help="Draw the same (PNG).", show_default="none", rich_help_panel=_PANEL),
    ] = None
    stats: Annotated[
        Path | None,
        typer.Option(
            help="Write hit rates, traffic, waiting, prediction and bound (JSON).",
            show_default="none",
            rich_help_panel=_PANEL,
        ),
    ] = None
    record: Annotated[
        Path | None,
        typer.Option(
            help="Write which experts every token went to, for moesys bench cache and moesys plan --routing.",
            show_default="none",
            rich_help_panel=_PANEL,
        ),
    ] = None
    cpu_moe: Annotated[
        bool, typer.Option("--cpu-moe", help="llama.cpp's; needs a GPU.", rich_help_panel=_PANEL)
    ] = False
    n_cpu_moe: Annotated[
        int | None,
        typer.Option(help="llama.cpp's; needs a GPU.", show_default=False, rich_help_panel=_PANEL),
    ] = None
    cpu_offload_gb: Annotated[
        float | None,
        typer.Option(help="vLLM's; needs a GPU.", show_default=False, rich_help_panel=_PANEL),
    ] = None

    @property
    def budget(self) -> str | None:
        """The budget of RAM that they ask for; None where they ask for none.

        Raises `ConfigError` where two of them name the same memory, and `IneffectiveOptionError` for one that splits a
        model between a GPU and the CPU: moesys does not compute on GPUs yet.
        """
        foreign = {
            "--cpu-moe": self.cpu_moe or None,
            "--n-cpu-moe": self.n_cpu_moe,
            "--cpu-offload-gb": self.cpu_offload_gb,
        }
        for name, value in foreign.items():
            if value is not None:
                raise IneffectiveOptionError(f"{name} has no effect: {_GPU_ONLY}")
        if self.host_memory is not None and self.device_memory is not None:
            raise ConfigError(
                f"--host-memory {self.host_memory} and --device-memory {self.device_memory} name the same RAM, since "
                "there is no GPU to compute on; give one of them"
            )
        return self.host_memory if self.device_memory is None else self.device_memory

    def make_request(
        self, num_positions: int | None, batch_size: int | None = None, num_texts: int | None = None
    ) -> OffloadRequest | None:
        """Returns what they ask for; None without a budget.

        num_positions: tokens of a sequence at most; batch_size: sequences at once; num_texts: sequences in all. None
        where the model or the plan decides. Raises what `budget` raises, and `IneffectiveOptionError` for an option
        that needs one.
        """
        from moesys.inference import OffloadRequest
        from moesys.planning import Goal

        budget = self.budget
        if budget is not None:
            goal = Goal.LATENCY if batch_size == 1 else Goal.THROUGHPUT
            return OffloadRequest(
                budget,
                num_positions,
                batch_size,
                num_texts,
                goal,
                predicts=self.predict,
                verifies=not self.no_verify,
            )
        needing = {
            "--offload-dir": self.offload_dir,
            "--predict": self.predict or None,
            "--no-verify": self.no_verify or None,
            "--usage": self.usage,
            "--trace": self.trace,
            "--timeline": self.timeline,
            "--stats": self.stats,
            "--record": self.record,
        }
        for name, value in needing.items():
            if value is not None:
                raise IneffectiveOptionError(
                    f"{name} has no effect without --host-memory: all weights are in memory then; give that or drop it"
                )
        return None


def takes_memory_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `MemoryOptions`, which it gets as the argument ``memory``."""
    hints = get_type_hints(MemoryOptions, include_extras=True)
    own = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(MemoryOptions)
    ]
    assert all(option.default is not MISSING for option in options)
    parameters = [parameter for name, parameter in own.parameters.items() if name != "memory"]

    @wraps(command)
    def run(**arguments: Any) -> None:
        memory = MemoryOptions(**{option.name: arguments.pop(option.name) for option in options})
        command(**arguments, memory=memory)

    run.__signature__ = own.replace(parameters=[*parameters, *options])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, *options]}
    return run
