"""From the options of ``moesys plan`` to the plan for a budget, and to those for a little more and less memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moesys.checkpoint import ModelInventory, Part, open_weights
from moesys.cli.inspect_sizing import Sizing, SizingOptions, read_sized
from moesys.cli.profiles import open_profile
from moesys.errors import ConfigError, GenerationError, ModelFormatError
from moesys.moe.routing_log import RoutingLog
from moesys.planning.activity import Activity, make_activity
from moesys.planning.budget import Budget
from moesys.planning.machine_profile import MachineProfile
from moesys.planning.miss_rates import LoggedMisses, count_misses
from moesys.planning.plan import Goal, InferencePlan, make_plan

_LARGEST_STEP_BYTES = 2**30
_STEPS_OF_BUDGET = 8


@dataclass(frozen=True)
class PlanOptions:
    """As they were given; None where they were not."""

    host_memory: str | None
    goal: str
    context: int | None
    batch: int | None
    routing: Path | None
    profile: Path | None


@dataclass(frozen=True)
class Plans:
    """A model's plan, and what would become of it.

    obstacle:           why the model cannot run within a budget as it is stored; None where it can, or none was given.
    budget_step_bytes:  what a little more and less memory is.
    with_more:          with so much more.
    with_less:          with so much less; None where that is too little.
    """

    sizing: Sizing
    obstacle: str | None
    plan: InferencePlan
    budget_step_bytes: int
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
    obstacle = None if options.host_memory is None else _find_obstacle(folder)
    misses = None if options.routing is None else _read_misses(options.routing, sizing.model)
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
            loads_first=options.host_memory is None,
        )

    profile = open_profile(folder, options.profile)
    plan = plan_for(budget, profile)
    step_bytes = choose_budget_step(budget.size_bytes)
    more = plan_for(replace(budget, size_bytes=budget.size_bytes + step_bytes), profile)
    try:
        less = plan_for(replace(budget, size_bytes=budget.size_bytes - step_bytes), profile)
    except GenerationError:
        less = None
    return Plans(sizing, obstacle, plan, step_bytes, more, less)


def choose_budget_step(budget_bytes: int) -> int:
    """Returns by how much a budget is changed to see what that brings: the power of two at or below an eighth of it, at
    least a byte and at most 1 GiB."""
    eighth = max(1, budget_bytes // _STEPS_OF_BUDGET)
    return min(_LARGEST_STEP_BYTES, 1 << (eighth.bit_length() - 1))


def _find_obstacle(path: Path) -> str | None:
    """Returns what opening the model within a budget would raise; reads headers."""
    try:
        with open_weights(path):
            return None
    except ModelFormatError as error:
        return str(error)


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
            f"--routing {path} was recorded from {_describe(log.num_experts)}, the model has {_describe(shape)}; "
            "record this model's routing"
        )
    return count_misses(log.demands(), f"{path.name}, {log.num_tokens} tokens")


def _describe(num_experts: Mapping[int, int]) -> str:
    sizes = ", ".join(map(str, sorted(set(num_experts.values()))))
    return f"{len(num_experts)} MoE layers of {sizes} experts"
