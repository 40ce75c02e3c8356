"""A model within a budget of memory: what every token uses is resident, experts share the slots that are left.

How a budget is spent is planned elsewhere; this carries it out: it allocates the slots and puts caches of experts
behind the expert-source seam. The model and the kernels are those of a resident run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from moesys.checkpoint import ExpertSections, list_banks, open_weights, read_layout
from moesys.inference.offload_plan import OffloadPlan, OffloadRequest, divide_slots, plan_offload
from moesys.inference.pages import PAGE_TOKENS
from moesys.inference.trace import Trace, TracedSource
from moesys.kernels import Int8Product
from moesys.models import Decoder
from moesys.moe import (
    CachedLayer,
    CachedSource,
    DemandTally,
    EarlyRouter,
    Execution,
    ExpertKey,
    ExpertSource,
    LocalDispatcher,
    Predictor,
    RoutingRecorder,
    SlotLayout,
    find_layers,
)
from moesys.store import (
    CacheStats,
    ChecksumRecord,
    HostTier,
    Section,
    SectionCache,
    SectionReader,
    SlotPool,
    UsageProfile,
    make_policy,
    preload,
)
from moesys.units import format_bytes


@dataclass(frozen=True)
class OffloadedModel:
    """A model whose experts come and go, ready for an `Engine`.

    experts:    on the disk; ``plan.tier.num_experts`` of them fit in memory.
    tier:       what of the budget is promised to what.
    caches:     one for each shape of experts.
    tally:      which experts every layer asked for; None where that is not noted.
    recorder:   the routing of all tokens so far; None where that is not recorded.
    predictor:  says what is read ahead on a guess; None where nothing is guessed. ``stats`` tell how often it was
                right.
    """

    model: Decoder
    execution: Execution
    experts: ExpertSections
    plan: OffloadPlan
    tier: HostTier
    caches: Mapping[SlotLayout, SectionCache[SlotPool]]
    tally: DemandTally | None
    recorder: RoutingRecorder | None
    predictor: Predictor | None

    @property
    def num_experts(self) -> int:
        """Of all layers."""
        return len(self.experts.sections)

    @property
    def num_pages(self) -> int:
        """Pages of keys and values that the plan has room for."""
        return self.plan.batch_size * -(-self.plan.num_positions // PAGE_TOKENS)

    @property
    def stats(self) -> CacheStats:
        """Of all caches together."""
        return sum_stats(self.caches.values())

    def describe_plan(self) -> str:
        """One line for people: what is where; a second one with the forecast, or with how to have one."""
        tier, plan = self.plan.tier, self.plan
        slots = sum(cache.pool.num_slots for cache in self.caches.values())
        slot_bytes = sum(cache.pool.num_bytes for cache in self.caches.values())
        num_tokens = plan.batch_size * plan.num_positions
        texts = f" of {plan.batch_size} texts at once" if plan.batch_size > 1 else ""
        where = (
            f"{format_bytes(tier.core_bytes)} of weights resident, {slots} of {self.num_experts} experts "
            f"({slots / self.num_experts:.0%}, {format_bytes(slot_bytes)}) kept in memory, "
            f"{format_bytes(tier.kv_bytes)} for keys and values of {num_tokens} tokens{texts}, "
            f"{format_bytes(tier.step_bytes)} for a pass of {plan.prefill_tokens} tokens; "
            f"{plan.read_mode} reads, {plan.num_readers} in flight"
        )
        forecast = (
            "no forecast of the speed: run moesys doctor once, which takes less than a minute"
            if plan.predicted is None
            else plan.predicted.describe()
        )
        return f"{where}\n{forecast}"

    def describe_traffic(self) -> str:
        """One line for people: what the caches did so far."""
        stats = self.stats
        asked = stats.num_hits + stats.num_misses
        unverified = f", {stats.num_unverified} UNVERIFIED" if stats.num_unverified else ""
        return (
            f"{stats.num_hits / max(asked, 1):.0%} of {asked} expert uses found in memory, "
            f"{format_bytes(stats.loaded_bytes)} read from the disk in {stats.num_loads} experts, "
            f"{stats.num_wasted} of them never used{unverified}; {stats.stall_s:.2f} s of waiting"
        )


@dataclass(frozen=True)
class Watch:
    """What is noted of a run within a budget; none of it changes what is computed.

    usage:    file of how often each expert was used: read where it exists, so that the run begins with what is used
              most, and written at the end.
    trace:    is told of everything that is read and computed.
    tallies:  whether it is noted which experts are asked for, in two bytes each: what a `RunMeter` judges the policy
              by.
    records:  whether the routing of all tokens is kept, two bytes for each choice of each layer.
    """

    usage: Path | None = None
    trace: Trace | None = None
    tallies: bool = False
    records: bool = False


def sum_stats(caches: Collection[SectionCache[SlotPool]]) -> CacheStats:
    """Returns the counts of several caches together."""
    names = [field.name for field in fields(CacheStats)]
    return CacheStats(**{name: sum(getattr(cache.stats, name) for cache in caches) for name in names})


@contextmanager
def load_offloaded(
    path: Path,
    request: OffloadRequest,
    *,
    product: Int8Product | None = None,
    watch: Watch | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[OffloadedModel]:
    """Loads a model folder or a packed file within a budget; its files stay open inside, and outside it computes no
    more.

    product:      how int8 weights are multiplied; None for ``w8``.
    watch:        what is noted of the run; None notes nothing.
    on_progress:  gets (bytes read, bytes to read), of what stays in memory.

    Raises `ModelFormatError` for a model whose experts cannot be read one by one, `ConfigError` for a budget that is
    none, `GenerationError` for one that is too small, and `DataError` for another model's usage; nothing is loaded
    then.
    """
    watch = watch or Watch()
    trace = watch.trace
    with ExitStack() as stack:
        weights = stack.enter_context(open_weights(path, product))
        plan = plan_offload(path, weights, request)
        profile = None if watch.usage is None else _read_usage(watch.usage, path)
        reader = stack.enter_context(
            SectionReader(
                plan.num_readers,
                mode=plan.read_mode,
                verifies=request.verifies,
                checksums=ChecksumRecord.open_default() if request.verifies else None,
                on_read=None if trace is None else trace.record_read,
            )
        )
        tier = _open_tier(reader, plan)
        caches = _make_caches(weights.experts, plan, tier, profile)
        model = weights.load_resident(on_progress)
        predictor = stack.enter_context(_open_predictor(model)) if request.predicts else None
        cached = CachedSource(_list_layers(model, weights.experts, caches), predictor=predictor)
        source: ExpertSource = cached
        if trace is not None:
            source = stack.enter_context(_tracing(cached, trace, model, weights.experts, caches))
        tally = DemandTally(source) if watch.tallies else None
        source = source if tally is None else tally
        recorder = RoutingRecorder(source) if watch.records else None
        source = source if recorder is None else recorder
        if profile is not None:
            for cache in caches.values():
                preload(cache, profile, cache.sections)
        offloaded = OffloadedModel(
            model,
            Execution(LocalDispatcher(), source),
            weights.experts,
            plan,
            tier,
            caches,
            tally,
            recorder,
            predictor,
        )
        try:
            yield offloaded
        finally:
            if watch.usage is not None and profile is not None:
                profile.follow({key: float(count) for key, count in cached.uses.items()}).write(watch.usage)


def _list_layers(
    model: Decoder, experts: ExpertSections, caches: Mapping[SlotLayout, SectionCache[SlotPool]]
) -> dict[int, CachedLayer]:
    return {
        layer_id: CachedLayer(
            caches[experts.layouts[layer_id]], bank.down_EDF.shape[0], experts.layouts[layer_id]
        )
        for layer_id, bank in list_banks(model)
    }


@contextmanager
def _tracing(
    source: ExpertSource,
    trace: Trace,
    model: Decoder,
    experts: ExpertSections,
    caches: Mapping[SlotLayout, SectionCache[SlotPool]],
) -> Iterator[TracedSource]:
    """Gives a source that tells a trace what the model does, while inside."""
    trace.name_sections(experts.sections)
    traced = TracedSource(source, trace, lambda: sum_stats(caches.values()).stall_s)
    with traced.watching(model):
        yield traced


def _open_predictor(model: Decoder) -> EarlyRouter:
    """Asks each layer's router early, with what the layer before saw."""
    return EarlyRouter({layer_id: layer.router for layer_id, layer in find_layers(model).items()})


def _open_tier(reader: SectionReader, plan: OffloadPlan) -> HostTier:
    """Promises the budget to all but the slots; where it is a share, what lies beside the weights is no part of it."""
    spent, budget = plan.tier, plan.tier.budget
    tier = HostTier(reader, None if budget.is_share else budget.size_bytes)
    tier.reserve("resident weights", spent.core_bytes)
    tier.reserve("keys and values", spent.kv_bytes)
    tier.reserve("a step", spent.step_bytes)
    tier.reserve("loading and libraries", max(0, spent.reserve_bytes - reader.staging_bytes))
    return tier


def _make_caches(
    experts: ExpertSections, plan: OffloadPlan, tier: HostTier, usage: UsageProfile | None
) -> dict[SlotLayout, SectionCache[SlotPool]]:
    sections: dict[SlotLayout, dict[ExpertKey, Section]] = {layout: {} for layout in experts.layouts.values()}
    for key, section in experts.sections.items():
        sections[experts.layouts[key[0]]][key] = section
    sizes = {layout: [s.num_bytes for s in of_layout.values()] for layout, of_layout in sections.items()}
    return {
        layout: SectionCache(
            tier.allocate_slots("experts", num_slots, layout.part_shapes),
            sections[layout],
            tier.reader,
            make_policy(plan.request.policy, usage),
        )
        for layout, num_slots in divide_slots(plan, sizes).items()
    }


def _read_usage(file: Path, model: Path) -> UsageProfile:
    """Returns the profile in a file, an empty one where there is no file yet."""
    name = _identify(model)
    return UsageProfile.read(file, name) if file.exists() else UsageProfile(name, {})


def _identify(model: Path) -> str:
    """Returns what tells models apart whose experts are used differently: their config."""
    keys = json.dumps(read_layout(model).keys, sort_keys=True)
    return hashlib.sha256(keys.encode()).hexdigest()[:16]
