"""Many tokens through one layer, forward only: arithmetic, not memory. Every system includes its router.

A system that needs longer than `Limits.slowest_call_seconds` for a call is left out from that number of tokens on.
The systems of a case differ up to a hundredfold, so after the first pass only those are measured again that came
near the fastest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import harness
import layer_peers
from harness import Claim, Measured, Spread, Timing
from layer_parts import GemmFlops
from layer_peers import OURS, OURS_IN_TORCH, BuiltLayer, UnavailableError
from layer_peers.workload import (
    Format,
    LayerShape,
    LayerWeights,
    check_layer,
    draw_tokens,
    draw_weights,
    find_tolerance,
)

CONTENDER_FACTOR = 1.3


@dataclass(frozen=True)
class Limits:
    """How long one number of tokens is measured, and from which time on a system is left out."""

    timing: Timing
    slowest_call_seconds: float = 6.0


@dataclass(frozen=True)
class ManyTokens:
    """One layer shape in one weight format, for several numbers of tokens, fewest first."""

    shape: LayerShape
    form: Format
    token_counts: tuple[int, ...]
    systems: tuple[str, ...]
    kernel: str
    limits: Limits
    floor: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.shape.name}/{self.form}"

    def measure(self, system: str) -> dict[str, Any]:
        """``calls``: seconds of each call by number of tokens; ``errors``; ``absent``: reasons."""
        build = layer_peers.load_builder(system)
        weights = draw_weights(self.shape, self.form, self.seed)
        record: dict[str, Any] = {"calls": {}, "errors": {}, "absent": {}}
        with torch.inference_mode():
            layer = build(layer_peers.find_variant(system, self.kernel), weights, self.shape.top_k)
            for count in self.token_counts:
                try:
                    cell = self._measure_cell(layer, weights, count)
                except UnavailableError as reason:
                    record["absent"][str(count)] = str(reason)
                    break
                record["calls"][str(count)], record["errors"][str(count)] = cell
        return record

    def _measure_cell(
        self, layer: BuiltLayer, weights: LayerWeights, num_tokens: int
    ) -> tuple[list[float], float]:
        """Returns the seconds of each call and the error of the first, which warms up and is not timed."""
        layer.check_room(num_tokens)
        exact_TD = draw_tokens(num_tokens, self.shape.hidden_size, self.seed + 1)
        x_TD = exact_TD.to(layer.activation_dtype)
        started = time.perf_counter()
        y_TD = layer.compute(x_TD)
        first_seconds = time.perf_counter() - started
        tolerance = find_tolerance(self.form, layer.activation_dtype, self.shape.top_k)
        error = check_layer(y_TD, exact_TD, weights, self.shape.top_k, tolerance)
        if first_seconds > self.limits.slowest_call_seconds:
            raise UnavailableError(f"a call takes {first_seconds:.1f} s")
        return harness.time_calls(lambda: layer.compute(x_TD), self.limits.timing), error

    def deserves_pass(self, system: str, measured: Measured) -> bool:
        """Ours always; a peer when in some number of tokens it came within `CONTENDER_FACTOR` of the fastest. Our torch
        kernel carries no claim."""
        if system == OURS:
            return True
        for count in self.token_counts:
            first = {
                name: statistics.median(records[0]["calls"][str(count)])
                for name, records in measured.records.items()
                if name not in (OURS, OURS_IN_TORCH) and str(count) in records[0]["calls"]
            }
            if system in first and first[system] <= CONTENDER_FACTOR * min(first.values()):
                return True
        return False

    def compute_pass_seconds(self, measured: Measured, system: str, count: int) -> list[float]:
        """The median call of each pass; none for passes in which the system was left out."""
        return [
            statistics.median(record["calls"][str(count)])
            for record in measured.records.get(system, [])
            if str(count) in record["calls"]
        ]

    def find_best_peer(self, measured: Measured, count: int) -> str | None:
        """The fastest system that is not ours and was measured as often; None without one."""
        num_passes = len(measured.records.get(OURS, []))
        seconds = {
            name: self.compute_pass_seconds(measured, name, count)
            for name in measured.records
            if name not in (OURS, OURS_IN_TORCH)
        }
        complete = {name: statistics.median(s) for name, s in seconds.items() if s and len(s) == num_passes}
        return min(complete, key=lambda name: complete[name]) if complete else None

    def compare_with_best_peer(self, measured: Measured, count: int) -> tuple[float, ...]:
        """Our speed over the best peer's, pass by pass; empty when one of them is missing."""
        ours = self.compute_pass_seconds(measured, OURS, count)
        best = self.find_best_peer(measured, count)
        if not ours or best is None:
            return ()
        return harness.pair_ratios(self.compute_pass_seconds(measured, best, count), ours)

    def make_claims(self, measured: Measured) -> list[Claim]:
        return [self._claim(measured, count) for count in self.token_counts]

    def _claim(self, measured: Measured, count: int) -> Claim:
        name = f"moe_layer/{self.name}/{count}_tokens_over_best_peer"
        pairs = self.compare_with_best_peer(measured, count)
        if pairs:
            return Claim(name, self.floor, pairs)
        missing = "peers" if self.compute_pass_seconds(measured, OURS, count) else OURS
        return Claim(name, self.floor, missing=missing)

    def format(self, measured: Measured, gemm_flops: GemmFlops) -> str:
        title = (
            f"many tokens, {self.form} weights: hidden {self.shape.hidden_size}, {self.shape.num_experts} experts "
            f"top-{self.shape.top_k} of {self.shape.inner_size}; milliseconds per call (10-90 %), share of GEMM"
        )
        header = ("system", *(f"{count} tokens" for count in self.token_counts))
        rows = [
            (
                system,
                *(
                    self._format_cell(measured, system, count, gemm_flops[self.form])
                    for count in self.token_counts
                ),
            )
            for system in measured.records
        ]
        return "\n".join(
            [
                title,
                harness.format_table(header, rows),
                *measured.absence_lines,
                *self._list_left_out(measured),
            ]
        )

    def _format_cell(self, measured: Measured, system: str, count: int, gemm_flops: float) -> str:
        calls = self._collect_calls(measured, system, count)
        if not calls:
            return "-"
        ms = Spread.of([1e3 * seconds for seconds in calls])
        share = count * self.shape.flops_per_token / (ms.median / 1e3) / gemm_flops
        return f"{ms.median:.1f} ({ms.low:.1f}-{ms.high:.1f}) {share:4.0%}"

    def _list_left_out(self, measured: Measured) -> list[str]:
        return [
            f"skipped {system} from {count} tokens on ({reason})"
            for system, records in measured.records.items()
            for count, reason in records[-1]["absent"].items()
        ]

    def _collect_calls(self, measured: Measured, system: str, count: int) -> list[float]:
        return [s for record in measured.records[system] for s in record["calls"].get(str(count), [])]

    def compute_shares(self, measured: Measured, gemm_flops: GemmFlops) -> dict[str, Spread]:
        """At the largest number of tokens."""
        flops = self.token_counts[-1] * self.shape.flops_per_token
        return {
            system: Spread.of([flops / seconds / gemm_flops[self.form] for seconds in calls])
            for system in measured.records
            if (calls := self._collect_calls(measured, system, self.token_counts[-1]))
        }


Result = tuple[ManyTokens, Measured]


def claim_median_over_cells(results: Sequence[Result], form: Format, floor: float) -> Claim:
    """The median over all cells of a format of our speed over the best peer's, pass by pass."""
    name = f"moe_layer/{form}/median_over_best_peer"
    cells = [
        pairs
        for case, measured in results
        if case.form is form
        for count in case.token_counts
        if (pairs := case.compare_with_best_peer(measured, count))
    ]
    return Claim(name, floor, _take_medians(cells)) if cells else Claim(name, floor, missing="peers")


def claim_bf16_over_fp32(results: Sequence[Result], floor: float) -> list[Claim]:
    """Our speed on bfloat16 weights over ours on float32 weights: per cell, and the median over cells."""
    cells = {}
    for case, measured in results:
        twin = next((r for r in results if r[0].shape == case.shape and r[0].form is Format.BF16), None)
        if case.form is not Format.FP32 or twin is None:
            continue
        for count in case.token_counts:
            fp32 = case.compute_pass_seconds(measured, OURS, count)
            bf16 = twin[0].compute_pass_seconds(twin[1], OURS, count)
            if fp32 and len(fp32) == len(bf16):
                name = f"moe_layer/{case.shape.name}/{count}_tokens_bf16_over_fp32"
                cells[name] = harness.pair_ratios(fp32, bf16)
    claims = [Claim(name, floor, pairs) for name, pairs in cells.items()]
    if len(claims) > 1:
        claims.append(Claim("moe_layer/median_bf16_over_fp32", floor, _take_medians(list(cells.values()))))
    return claims


def _take_medians(cells: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """The median over cells, pass by pass."""
    return tuple(statistics.median(ratios) for ratios in zip(*cells, strict=True))
