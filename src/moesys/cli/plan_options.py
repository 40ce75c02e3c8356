"""From the options of ``moesys plan`` to the plan for a budget, and to those for a little more and less memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moesys.checkpoint import ModelInventory, Part
from moesys.cli.inspect_sizing import Sizing, SizingOptions, read_sized
from moesys.cli.profiles import open_profile
from moesys.errors import ConfigError, GenerationError, ModelFormatError
from moesys.moe.routing_log import RoutingLog
from moesys.planning.activity import Activity, make_activity
from moesys.planning.budget import Budget
from moesys.planning.machine_profile import MachineProfile
from moesys.planning.miss_rates import LoggedMisses, count_misses
from moesys.planning.plan import Goal, InferencePlan, make_plan

STEP_BYTES = 2**30
"""What a little more and less memory is."""


@dataclass(frozen=True)
class PlanOptions:
    """As they were given; None where they were not."""

    host_memory: str | None
    goal: str
    context: int | None
    batch: int | None
    usage: Path | None
    profile: Path | None


@dataclass(frozen=True)
class Plans:
    """A model's plan, and what would become of it.

    with_more:  with 1 GiB more.
    with_less:  with 1 GiB less; None where that is too little.
    """

    sizing: Sizing
    plan: InferencePlan
    with_more: InferencePlan
    with_less: InferencePlan | None


def make_plans(folder: Path, options: PlanOptions) -> Plans:
    """Reads a model's headers and plans for it.

    Raises `ModelFormatError` for one that moesys cannot size, `ConfigError` and `DataError` for options, and
    `GenerationError` for a budget that is too small.
    """
    if options.goal not in list(Goal):
        raise ConfigError(f"--goal ({options.goal!r}) must be {' or '.join(Goal)}")
    goal = Goal(options.goal)
    inventory, sizing = read_sized(folder, SizingOptions(None, options.host_memory, options.context, None))
    if sizing is None:
        raise ModelFormatError(f"{folder} cannot be planned for: {inventory.obstacle}")
    misses = None if options.usage is None else _read_misses(options.usage, sizing.model)
    activity = _measure_activity(sizing)
    # Where there is a GPU its memory is the first tier; this plans for the CPU.
    budget = sizing.placement.tiers[-1].budget

    def plan_for(budget: Budget, profile: MachineProfile) -> InferencePlan:
        return make_plan(
            sizing.footprint,
            budget,
            profile,
            num_positions=sizing.context_tokens,
            active=activity,
            step_bytes=sizing.count_step_bytes,
            goal=goal,
            batch_size=options.batch,
            misses=misses,
        )

    profile = open_profile(folder, options.profile)
    plan = plan_for(budget, profile)
    more = plan_for(replace(budget, size_bytes=budget.size_bytes + STEP_BYTES), profile)
    try:
        less = plan_for(replace(budget, size_bytes=budget.size_bytes - STEP_BYTES), profile)
    except GenerationError:
        less = None
    return Plans(sizing, plan, more, less)


def _measure_activity(sizing: Sizing) -> Activity:
    model = sizing.model
    embedding = model.parts[Part.EMBEDDING].loaded_bytes
    return make_activity(
        model.config,
        sizing.footprint,
        [layer.each.loaded_bytes for layer in model.experts],
        lookup_bytes=0 if model.config.tie_embeddings else embedding,
    )


def _read_misses(path: Path, model: ModelInventory) -> LoggedMisses:
    log = RoutingLog.read(path)
    shape = {layer.layer_id: layer.num_experts for layer in model.experts}
    if dict(log.num_experts) != shape:
        raise ConfigError(
            f"--usage {path} was recorded from {_describe(log.num_experts)}, the model has {_describe(shape)}; record "
            "this model's routing"
        )
    return count_misses(log.demands(), f"{path.name}, {log.num_tokens} tokens")


def _describe(num_experts: Mapping[int, int]) -> str:
    sizes = ", ".join(map(str, sorted(set(num_experts.values()))))
    return f"{len(num_experts)} MoE layers of {sizes} experts"
