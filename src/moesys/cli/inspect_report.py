"""What ``moesys inspect`` prints: lines of at most 80 columns, or one object for programs with units in its names."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moesys.checkpoint import Inventory, ModelInventory, PartSize, WeightCheck
from moesys.cli.inspect_sizing import Sizing
from moesys.models import AttentionConfig, DecoderConfig, LatentAttentionConfig, MixerConfig
from moesys.planning import Placement, TierPlacement
from moesys.units import format_bytes, format_count

_MAX_LISTED = 20
_WIDTH = 80


@dataclass(frozen=True)
class Report:
    """All that is known of a folder; ``sizing`` is None where moesys does not know the family."""

    inventory: Inventory
    sizing: Sizing | None = None

    def render_text(self) -> list[str]:
        """Returns the lines for people."""
        sizing = self.sizing
        kind = self.inventory.model_type or "no model_type"
        if sizing is not None:
            kind += f" ({sizing.model.family.architecture})"
        lines = [
            f"{self.inventory.folder.resolve().name}: {kind}",
            *_wrap("files", _describe_files(self.inventory)),
        ]
        if sizing is not None:
            lines += [
                *_describe_model(sizing.model),
                "",
                *_render_parts(sizing),
                "",
                *_render_placement(sizing),
            ]
        if self.inventory.obstacle is not None:
            lines += ["", "moesys cannot load it:", *_wrap_paragraphs(self.inventory.obstacle)]
        return lines

    def render_json(self, check: WeightCheck | None) -> dict[str, Any]:
        """Returns the object for programs."""
        inventory = self.inventory
        return {
            "model_type": inventory.model_type,
            "loads": inventory.obstacle is None,
            "obstacle": inventory.obstacle,
            "num_files": inventory.num_files,
            "num_tensors": inventory.num_tensors,
            "stored_bytes": inventory.stored_bytes,
            "dtype_bytes": dict(inventory.dtypes),
            "model": None if self.sizing is None else _encode_model(self.sizing),
            "placement": None if self.sizing is None else _encode_placement(self.sizing.placement),
            "check": None if check is None else asdict(check) | {"bytes_per_second": check.bytes_per_second},
        }


def render_check(check: WeightCheck) -> list[str]:
    """Returns the lines that tell what `check_weights` found."""
    work = (
        f"{format_bytes(check.num_bytes)} in {check.seconds:.1f} s ({format_bytes(check.bytes_per_second)}/s)"
    )
    if not check.found:
        return ["", f"checked {work}: all weights are finite"]
    lines = [
        f"  {found.name}: {found.num_nan} NaN, {found.num_inf} Inf" for found in check.found[:_MAX_LISTED]
    ]
    if len(check.found) > _MAX_LISTED:
        lines.append(f"  and {len(check.found) - _MAX_LISTED} more")
    return ["", f"checked {work}: {len(check.found)} of {check.num_tensors} tensors hold NaN or Inf", *lines]


def _describe_files(inventory: Inventory) -> str:
    model = inventory.model
    by_kind = inventory.dtypes if model is None else model.formats
    kinds = ", ".join(f"{kind} {format_bytes(num_bytes)}" for kind, num_bytes in by_kind.items())
    unused = f"; {format_bytes(model.unused_bytes)} of it not used" if model and model.unused_bytes else ""
    return (
        f"{inventory.num_files}, with {inventory.num_tensors} tensors, "
        f"{format_bytes(inventory.stored_bytes)} ({kinds}){unused}"
    )


def _describe_model(model: ModelInventory) -> Iterator[str]:
    config = model.config
    num_parameters, num_active = model.total.num_parameters, model.num_active_parameters
    active = f", {format_count(num_active)} active per token" if num_active < num_parameters else ""
    yield from _wrap("parameters", format_count(num_parameters) + active)
    yield from _wrap("layers", _describe_layers(model))
    yield from _wrap("attention", "; ".join(_describe_mixers(config)))
    yield from _wrap("context", f"{config.position_limit} tokens, of a vocabulary of {config.vocab_size}")


def _describe_layers(model: ModelInventory) -> str:
    config = model.config
    moe_ids = set(config.moe_layer_ids)
    kinds = [
        f"{count} with {num_experts} experts, {top_k} per token"
        for (num_experts, top_k), count in Counter((e.num_experts, e.top_k) for e in model.experts).items()
    ]
    if dense_ids := [i for i in range(config.num_layers) if i not in moe_ids]:
        which = f" ({_format_ranges(dense_ids)})" if moe_ids else ""
        kinds.append(f"{len(dense_ids)} dense{which}")
    return f"{config.num_layers}: {'; '.join(kinds)}"


def _describe_mixers(config: DecoderConfig) -> Iterator[str]:
    """Yields the kinds of mixers, then the windows."""
    heads = Counter(_describe_heads(mixer) for mixer in config.mixers)
    windows = Counter(mixer.sliding_window for mixer in config.mixers if mixer.sliding_window is not None)
    for text, count in heads.items():
        yield text if len(heads) == 1 else f"{text} in {count} layers"
    for window, count in windows.items():
        yield f"{count} of {config.num_layers} layers see {window} tokens"


def _describe_heads(mixer: MixerConfig) -> str:
    if isinstance(mixer, AttentionConfig):
        return f"{mixer.num_heads} heads of {mixer.head_dim}, {mixer.num_kv_heads} for keys and values"
    if isinstance(mixer, LatentAttentionConfig):
        return f"latent, {mixer.num_heads} heads of {mixer.key_dim} for keys and {mixer.value_dim} for values"
    return mixer.kind


def _render_parts(sizing: Sizing) -> Iterator[str]:
    model = sizing.model
    yield f"  {'part':<24}{'parameters':>12}{'in files':>14}{'in memory, ' + sizing.dtype:>20}"
    for part, size in model.parts.items():
        yield _render_size(part.replace("_", " "), size)
    yield _render_size("all", model.total)
    sizes = {layer.each: layer for layer in model.experts}
    for size, layer in sizes.items():
        name = "one expert" if len(sizes) == 1 else f"one of layer {layer.layer_id}'s"
        yield _render_size(name, size)
    if model.experts:
        used = sum(layer.top_k * layer.each.loaded_bytes for layer in model.experts)
        yield f"  {'experts of one token':<50}{format_bytes(used):>20}"
    per_token = sizing.footprint.kv_bytes_per_token
    limit = model.config.position_limit
    yield f"  {'KV cache of one token':<50}{format_bytes(per_token):>20}"
    yield f"  {f'KV cache of {limit} tokens':<50}{format_bytes(per_token * limit):>20}"


def _render_size(name: str, size: PartSize) -> str:
    return (
        f"  {name:<24}{format_count(size.num_parameters):>12}{format_bytes(size.stored_bytes):>14}"
        f"{format_bytes(size.loaded_bytes):>20}"
    )


def _render_placement(sizing: Sizing) -> Iterator[str]:
    placement, num_experts = sizing.placement, len(sizing.footprint.section_bytes)
    yield f"  {_describe_verdict(placement, num_experts)}"
    for tier in placement.tiers:
        if len(placement.tiers) > 1:
            yield f"  {tier.budget.tier}"
        yield from _render_tier(tier, sizing)
    if placement.num_experts_on_disk:
        yield _render_row("disk", placement.disk_bytes, f"{placement.num_experts_on_disk} experts")


def _describe_verdict(placement: Placement, num_experts: int) -> str:
    budgets = [f"{format_bytes(tier.budget.size_bytes)} of {tier.budget.tier}" for tier in placement.tiers]
    if placement.missing_bytes:
        return f"does not fit in {budgets[0]}: {format_bytes(placement.missing_bytes)} are missing"
    if placement.is_resident:
        return f"fits in {budgets[0]}"
    kept = num_experts - placement.num_experts_on_disk
    return f"{kept} of {num_experts} experts fit in {' and '.join(budgets)}"


def _render_tier(tier: TierPlacement, sizing: Sizing) -> Iterator[str]:
    beside = " (beside the share)" if tier.budget.is_share else ""
    if tier.core_bytes:
        yield _render_row("  used by every token", tier.core_bytes, "all but the experts")
    if sizing.footprint.section_bytes:
        yield _render_row("  experts", tier.expert_bytes, f"{tier.num_experts} of them")
    if tier.kv_bytes:
        yield _render_row("  KV cache", tier.kv_bytes, f"{sizing.placement.context_tokens} tokens{beside}")
    if tier.step_bytes:
        yield _render_row("  a step", tier.step_bytes, f"{sizing.pass_tokens} tokens of a prompt{beside}")
    yield _render_row("  reserve", tier.reserve_bytes, f"loading and libraries{beside}")


def _render_row(name: str, num_bytes: int, note: str) -> str:
    return f"  {name:<24}{format_bytes(num_bytes):>12}  {note}"


def _encode_model(sizing: Sizing) -> dict[str, Any]:
    model, config = sizing.model, sizing.model.config
    return {
        "family": model.family.model_type,
        "architecture": model.family.architecture,
        "num_parameters": model.total.num_parameters,
        "num_active_parameters": model.num_active_parameters,
        "num_layers": config.num_layers,
        "num_dense_layers": config.num_layers - len(model.experts),
        "moe_layers": [_encode_experts(asdict(layer)) for layer in model.experts],
        "windows_tokens": [mixer.sliding_window for mixer in config.mixers],
        "context_tokens": config.position_limit,
        "vocab_size": config.vocab_size,
        "loaded_dtype": sizing.dtype,
        "loaded_bytes": model.total.loaded_bytes,
        "format_bytes": dict(model.formats),
        "unused_bytes": model.unused_bytes,
        "parts": {part.value: asdict(size) for part, size in model.parts.items()},
        "kv_bytes_per_token": sizing.footprint.kv_bytes_per_token,
    }


def _encode_experts(layer: dict[str, Any]) -> dict[str, Any]:
    each: Mapping[str, int] = layer.pop("each")
    return layer | {f"expert_{name}": value for name, value in each.items()}


def _encode_placement(placement: Placement) -> dict[str, Any]:
    return {
        **asdict(placement),
        "is_resident": placement.is_resident,
        "missing_bytes": placement.missing_bytes,
    }


def _wrap(label: str, text: str) -> Iterator[str]:
    """Yields a labelled line, broken between words where it would be too long."""
    yield from textwrap.wrap(
        text, _WIDTH, initial_indent=f"  {label:<12}", subsequent_indent=" " * 14, break_on_hyphens=False
    )


def _wrap_paragraphs(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield from textwrap.wrap(
            line, _WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )


def _format_ranges(ids: Iterable[int]) -> str:
    """Returns ascending numbers as ``0-2, 5``."""
    runs: list[tuple[int, int]] = []
    for number in ids:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
