"""Few tokens through layers that lie in memory: how much of the memory's read rate becomes expert weights read.

One token per call visits every expert of every layer once before any comes again: tokens are made for one group of
k experts after the other. More tokens choose freely, and the experts that any of them chose are counted once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import layer_peers
from harness import Claim, Measured, Spread, Timing
from layer_parts import GemmFlops, streams
from layer_peers import OURS, BuiltLayer
from layer_peers.workload import (
    Format,
    LayerShape,
    LayerWeights,
    check_layer,
    choose_experts,
    draw_token_for,
    draw_tokens,
    draw_weights,
    find_tolerance,
)


@dataclass(frozen=True)
class Decode:
    """One weight format of one layer shape, for several numbers of tokens per call."""

    shape: LayerShape
    form: Format
    token_counts: tuple[int, ...]
    systems: tuple[str, ...]
    kernel: str
    timing: Timing
    floor: float
    goal: float
    seed: int
    distinct_bytes: int = streams.DISTINCT_BYTES

    @property
    def name(self) -> str:
        return f"decode/{self.form}"

    def measure(self, system: str) -> dict[str, Any]:
        build = layer_peers.load_builder(system)
        variant = layer_peers.find_variant(system, self.kernel)
        weights = draw_weights(self.shape, self.form, self.seed)
        inputs = {count: self.draw_inputs(count, weights) for count in self.token_counts}
        sweep_bytes = {count: self._count_bytes(xs, weights) for count, xs in inputs.items()}
        num_layers = -(-self.distinct_bytes // min(sweep_bytes.values()))
        with torch.inference_mode():
            layers = [build(variant, weights, self.shape.top_k)]
            for xs in inputs.values():
                self._check(layers[0], xs[0], weights)
            layers += [build(variant, weights.copy(), self.shape.top_k) for _ in range(1, num_layers)]
            sweeps = {
                f"{count} token{'s'[: count > 1]}": (num_layers * sweep_bytes[count], _make_sweep(layers, xs))
                for count, xs in inputs.items()
            }
            return {"num_layers": num_layers, **streams.record_sweeps(sweeps, self.timing)}

    def draw_inputs(self, num_tokens: int, weights: LayerWeights) -> list[Tensor]:
        """The (tokens, hidden) inputs of one sweep over a layer."""
        if num_tokens > 1:
            return [draw_tokens(num_tokens, self.shape.hidden_size, self.seed + 1)]
        k, num_experts = self.shape.top_k, self.shape.num_experts
        return [
            draw_token_for(range(first, first + k), weights.router_ED, self.seed + first)
            for first in range(0, num_experts - k + 1, k)
        ]

    def _count_bytes(self, xs: list[Tensor], weights: LayerWeights) -> int:
        choices = [choose_experts(x_TD, weights.router_ED, self.shape.top_k) for x_TD in xs]
        return sum(weights.count_read_bytes(choice.expert_ids_TK) for choice in choices)

    def _check(self, layer: BuiltLayer, x_TD: Tensor, weights: LayerWeights) -> None:
        tolerance = find_tolerance(self.form, layer.activation_dtype, self.shape.top_k)
        y_TD = layer.compute(x_TD.to(layer.activation_dtype))
        check_layer(y_TD, x_TD, weights, self.shape.top_k, tolerance)

    def deserves_pass(self, system: str, measured: Measured) -> bool:
        return True

    def make_claims(self, measured: Measured) -> list[Claim]:
        if self.form not in streams.CLAIMED_FORMATS or OURS not in self.systems or 1 not in self.token_counts:
            return []
        name = f"moe_layer/decode/{self.form}/1_token_of_read_rate"
        return [streams.claim_read_share(name, measured, "1 token", self.floor, self.goal)]

    def format(self, measured: Measured, gemm_flops: GemmFlops) -> str:
        title = (
            f"decode, {self.form} weights: {self.shape.num_experts} experts top-{self.shape.top_k} of "
            f"{self.shape.inner_size}, hidden {self.shape.hidden_size}"
        )
        return streams.format_sweeps(title, measured)

    def compute_shares(self, measured: Measured, gemm_flops: GemmFlops) -> dict[str, Spread]:
        return streams.compute_share_spreads(measured)


def _make_sweep(layers: list[BuiltLayer], xs: list[Tensor]) -> Callable[[], None]:
    inputs = [x_TD.to(layers[0].activation_dtype) for x_TD in xs]

    def sweep() -> None:
        for x_TD in inputs:
            for layer in layers:
                layer.compute(x_TD)

    return sweep
