"""What ``moesys plan`` prints: lines of at most 80 columns, or one object for programs with units in its names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from moesys.checkpoint import Part
from moesys.cli.plan_options import Plans
from moesys.planning.plan import InferencePlan, StepMode, format_range
from moesys.planning.speed import Prediction
from moesys.units import format_bytes

_COLUMNS = 80


def render_plans(plans: Plans) -> Iterator[str]:
    """Yields the lines for people."""
    plan = plans.plan
    yield f"{plans.sizing.model.family.architecture} within {_name_budget(plans)}"
    if plans.obstacle is not None:
        yield from wrap(f"It cannot run like this: {plans.obstacle}", _COLUMNS, break_long_words=False)
    yield ""
    yield from _render_memory(plans)
    yield ""
    yield from _render_speed(plan)
    yield ""
    name = format_bytes(plans.budget_step_bytes)
    yield _render_change(f"{name} more", plan, plans.with_more)
    yield _render_change(f"{name} less", plan, plans.with_less)


def encode_plans(plans: Plans) -> dict[str, Any]:
    """Returns the object for programs."""
    return {
        "plan": _encode(plans.plan),
        "parts": {part.value: size.loaded_bytes for part, size in plans.sizing.model.parts.items()},
        "obstacle": plans.obstacle,
        "budget_step_bytes": plans.budget_step_bytes,
        "with_more": _encode(plans.with_more),
        "with_less": None if plans.with_less is None else _encode(plans.with_less),
    }


def _name_budget(plans: Plans) -> str:
    tier, weight_bytes = plans.plan.tier, plans.sizing.footprint.weight_bytes
    size = format_bytes(tier.budget.size_bytes)
    if not tier.budget.is_share:
        return f"{size} of {tier.budget.tier}"
    share = tier.budget.size_bytes / weight_bytes
    return f"{share:.0%} of its weights, {size}; {format_bytes(tier.used_bytes)} of {tier.budget.tier} in all"


def _render_memory(plans: Plans) -> Iterator[str]:
    plan = plans.plan
    tier, placement = plan.tier, plan.placement
    yield f"  {'':<22}{'RAM':>12}{'disk':>12}"
    for part, size in plans.sizing.model.parts.items():
        if part is not Part.EXPERTS:
            yield _row(part.value.replace("_", " "), size.loaded_bytes, 0)
    if plans.sizing.footprint.section_bytes:
        count = f"{plan.num_slots} of {plan.speed.activity.num_experts} in RAM"
        yield _row("experts", tier.expert_bytes, placement.disk_bytes, count)
    sequences = "1 sequence" if plan.batch_size == 1 else f"{plan.batch_size} sequences"
    yield _row("KV cache", tier.kv_bytes, 0, f"{sequences} of {plan.num_positions} tokens")
    yield _row("a step", tier.step_bytes, 0, f"{plan.prefill_tokens} tokens of a prompt")
    yield _row("reserve", tier.reserve_bytes, 0, "loading and libraries")
    yield _row("all", tier.used_bytes, placement.disk_bytes)
    if tier.budget.is_share:
        yield "  the share bounds weights; KV cache, a step and the reserve come on top"


def _render_speed(plan: InferencePlan) -> Iterator[str]:
    prompt = plan.workload.prompt_tokens
    yield from _render_table(
        ("", "experts", "predicted tokens/s", "at most", "bound by"),
        _list_cells(f"prompt of {prompt} tokens", plan.prefill_mode, plan.prefill),
        _list_cells("writing", plan.decode_mode, plan.decode),
    )
    if plan.prefill_mode is StepMode.RESIDENT and plan.prefill.bound_times.disk_s > 0:
        yield "  the first prompt reads the experts, which then stay in memory"
    if plan.decode_mode is StepMode.CACHE:
        misses = plan.speed.misses
        yield f"  {misses.find_rate(plan.num_slots):.0%} of the experts that a token needs are read ({misses.source})"
        if misses.is_assumed:
            yield "  the higher rates are for routing that prefers some experts, as is usual"
        yield f"  disk: {plan.read_mode} reads, {plan.num_readers} in flight"
    yield f"  measured {plan.speed.profile.measured_on} on {plan.speed.profile.machine.cpu}"


def _list_cells(name: str, mode: StepMode, prediction: Prediction) -> tuple[str, ...]:
    rate = format_range(prediction.tokens_per_s, prediction.tokens_per_s_if_skewed)
    bound = format_range(prediction.bound_tokens_per_s, prediction.bound_tokens_per_s_if_skewed)
    return name, mode, rate, bound, prediction.bound


def _render_table(*rows: tuple[str, ...]) -> Iterator[str]:
    """Yields a line per row, its cells two columns apart at least."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()


def _render_change(name: str, plan: InferencePlan, changed: InferencePlan | None) -> str:
    if changed is None:
        return f"  {name}: too little to run"
    prompts = changed.prefill.tokens_per_s / plan.prefill.tokens_per_s - 1
    writing = changed.decode.tokens_per_s / plan.decode.tokens_per_s - 1
    return (
        f"  {name}: prompts {prompts:+.0%}, writing {writing:+.0%} "
        f"({changed.num_slots} experts in RAM, passes of {changed.prefill_tokens})"
    )


def _row(name: str, ram_bytes: int, disk_bytes: int, note: str = "") -> str:
    disk = format_bytes(disk_bytes) if disk_bytes else ""
    return f"  {name:<22}{format_bytes(ram_bytes):>12}{disk:>12}  {note}".rstrip()


def _encode(plan: InferencePlan) -> dict[str, Any]:
    misses = plan.speed.misses
    return {
        "goal": plan.goal,
        "placement": asdict(plan.placement),
        "used_bytes": plan.tier.used_bytes,
        "prefill_tokens": plan.prefill_tokens,
        "batch_size": plan.batch_size,
        "num_positions": plan.num_positions,
        "num_slots": plan.num_slots,
        "read_mode": plan.read_mode,
        "num_readers": plan.num_readers,
        "miss_rate": misses.find_rate(plan.num_slots) if plan.decode_mode is StepMode.CACHE else 0.0,
        "miss_source": misses.source,
        "workload": asdict(plan.workload),
        "prefill": {"mode": plan.prefill_mode, **_encode_prediction(plan.prefill)},
        "decode": {"mode": plan.decode_mode, **_encode_prediction(plan.decode)},
        "measured_on": plan.speed.profile.measured_on,
    }


def _encode_prediction(prediction: Prediction) -> dict[str, Any]:
    return {
        "num_tokens": prediction.num_tokens,
        "tokens_per_s": prediction.tokens_per_s,
        "tokens_per_s_if_skewed": prediction.tokens_per_s_if_skewed,
        "bound": prediction.bound,
        "bound_tokens_per_s": prediction.bound_tokens_per_s,
        "bound_tokens_per_s_if_skewed": prediction.bound_tokens_per_s_if_skewed,
        "bound_times_s": asdict(prediction.bound_times),
    }
