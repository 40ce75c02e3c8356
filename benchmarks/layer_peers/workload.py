"""What one MoE layer is given and must give back: shapes, weights, tokens, routing, and the float64 answer.

Every system gets the same numbers, drawn from a seed, rounded so that bfloat16 holds inputs and router exactly.
The answer is computed for a few tokens only, those whose choice of experts is clearest, because rounding flips
near ties. Nothing here is timed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from moesys.kernels.formats import Int8Product, Int8Weight, pack_int8, round_to_int8

POOL_SIZE = 1_000_003
"""A prime, so that no two rows of a matrix start at the same place of the pool before a million rows."""

CHECKED_TOKENS = 4
EXPERT_PULL = 8.0
"""How far above the others, in standard deviations, the logits of experts lie that a token was made for."""


class WrongResultError(RuntimeError):
    """A system whose result is not the layer's; it is not timed."""


class Format(StrEnum):
    """What expert weights are held in."""

    FP32 = "fp32"
    BF16 = "bf16"
    W8 = "w8"
    W8A8 = "w8a8"

    @property
    def int8_product(self) -> Int8Product | None:
        return Int8Product(self.value) if self in (Format.W8, Format.W8A8) else None


@dataclass(frozen=True)
class LayerShape:
    """SwiGLU experts behind a softmax router whose k weights are scaled to sum to one."""

    hidden_size: int
    inner_size: int
    num_experts: int
    top_k: int

    @property
    def name(self) -> str:
        return f"{self.hidden_size}x{self.inner_size}-e{self.num_experts}-k{self.top_k}"

    @property
    def flops_per_token(self) -> int:
        """2 x (3 x k x hidden x inner + hidden x experts), forward only."""
        experts = 3 * self.top_k * self.hidden_size * self.inner_size
        return 2 * (experts + self.hidden_size * self.num_experts)


Weight = Tensor | Int8Weight


def count_bytes(weight: Weight) -> int:
    return weight.num_bytes if isinstance(weight, Int8Weight) else weight.nbytes


def copy_weight(weight: Weight) -> Weight:
    """The same numbers in memory of their own."""
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.values.clone(), weight.scales.clone(), weight.num_columns, weight.product)
    return weight.clone()


def widen(weight: Weight) -> Tensor:
    """The numbers that a weight stands for, in float64."""
    return weight.unpack(torch.float64) if isinstance(weight, Int8Weight) else weight.double()


def multiply(weight: Weight, x_K: Tensor) -> Tensor:
    """Returns weight @ x in float64, of a weight's rows with (columns,) numbers."""
    if isinstance(weight, Int8Weight) and weight.product is Int8Product.W8A8:
        values, scales = round_to_int8(x_K.unsqueeze(0))
        x_K = Int8Weight(values, scales, x_K.shape[0]).unpack(torch.float64).squeeze(0)
    return widen(weight) @ x_K.double()


@dataclass(frozen=True)
class LayerWeights:
    """router_ED (experts, hidden) float32; gate_up_EFD (experts, 2 x inner, hidden), gate first; down_EDF
    (experts, hidden, inner); the last two in the format."""

    router_ED: Tensor
    gate_up_EFD: Weight
    down_EDF: Weight

    @property
    def num_experts(self) -> int:
        return self.router_ED.shape[0]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return (count_bytes(self.gate_up_EFD) + count_bytes(self.down_EDF)) // self.num_experts

    def copy(self) -> LayerWeights:
        return LayerWeights(self.router_ED.clone(), copy_weight(self.gate_up_EFD), copy_weight(self.down_EDF))

    def count_read_bytes(self, expert_ids_TK: Tensor) -> int:
        """Bytes of the router and of every expert that is chosen at least once."""
        return self.router_ED.nbytes + expert_ids_TK.unique().numel() * self.expert_bytes


@dataclass(frozen=True)
class Choice:
    """Who gets each token, in float64: expert_ids_TK, weights_TK, and by how much the last expert chosen beats
    the first one not chosen (margins_T, in logits)."""

    expert_ids_TK: Tensor
    weights_TK: Tensor
    margins_T: Tensor


def draw_matrices(shape: tuple[int, ...], form: Format, generator: torch.Generator) -> Weight:
    """(..., rows, columns) of standard deviation 1 / sqrt(columns), cut from one pool of random numbers: drawing
    every weight would take longer than the measurement."""
    pool = torch.randn(POOL_SIZE, generator=generator) / math.sqrt(shape[-1])
    count = math.prod(shape)
    if form is Format.BF16:
        pool = pool.bfloat16()
    weight = pool.repeat(-(-count // POOL_SIZE))[:count].view(shape)
    return weight if form.int8_product is None else _pack(weight, form.int8_product)


def _pack(weight: Tensor, product: Int8Product) -> Int8Weight:
    """Packs matrix by matrix, since packing needs several times the memory of what it packs."""
    if weight.ndim == 2:
        return pack_int8(weight, product)
    packed = [pack_int8(matrix, product) for matrix in weight]
    values, scales = (
        torch.stack(parts) for parts in zip(*((p.values, p.scales) for p in packed), strict=True)
    )
    return Int8Weight(values, scales, weight.shape[-1], product)


def draw_weights(shape: LayerShape, form: Format, seed: int) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)
    D, F, E = shape.hidden_size, shape.inner_size, shape.num_experts
    router_ED = torch.randn(E, D, generator=generator) / math.sqrt(D)
    return LayerWeights(
        router_ED.bfloat16().float(),
        draw_matrices((E, 2 * F, D), form, generator),
        draw_matrices((E, D, F), form, generator),
    )


def draw_tokens(num_tokens: int, hidden_size: int, seed: int) -> Tensor:
    """(tokens, hidden) float32 that bfloat16 holds exactly; a random router spreads them about evenly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, hidden_size, generator=generator).bfloat16().float()


def draw_token_for(expert_ids: range, router_ED: Tensor, seed: int) -> Tensor:
    """(1, hidden) float32: a token whose largest logits are those of ``expert_ids``."""
    pull_D = EXPERT_PULL * router_ED[list(expert_ids)].sum(dim=0)
    return (draw_tokens(1, router_ED.shape[1], seed) + pull_D).bfloat16().float()


def choose_experts(x_TD: Tensor, router_ED: Tensor, top_k: int) -> Choice:
    logits_TE = x_TD.double() @ router_ED.double().t()
    ranked_TE, expert_ids_TE = logits_TE.sort(dim=-1, descending=True, stable=True)
    weights_TK = ranked_TE[:, :top_k].softmax(dim=-1)
    margins_T = (
        ranked_TE[:, top_k - 1] - ranked_TE[:, top_k]
        if top_k < ranked_TE.shape[1]
        else ranked_TE.new_full((ranked_TE.shape[0],), math.inf)
    )
    return Choice(expert_ids_TE[:, :top_k], weights_TK, margins_T)


def compute_answer(x_TD: Tensor, weights: LayerWeights, choice: Choice) -> Tensor:
    """The layer's result (tokens, hidden) in float64, token by token; w8a8 rounds what enters a product."""
    rows = []
    for x_D, expert_ids, shares in zip(
        x_TD.double(), choice.expert_ids_TK.tolist(), choice.weights_TK, strict=True
    ):
        y_D = torch.zeros_like(x_D)
        for expert, share in zip(expert_ids, shares, strict=True):
            gate_F, up_F = multiply(weights.gate_up_EFD[expert], x_D).chunk(2)
            y_D += share * multiply(weights.down_EDF[expert], torch.nn.functional.silu(gate_F) * up_F)
        rows.append(y_D)
    return torch.stack(rows)


def find_tolerance(form: Format, activation_dtype: torch.dtype, top_k: int) -> float:
    """The largest error allowed, as a share of the largest value.

    bfloat16 activations: 2**-9 at each of six roundings on the way through an expert and of k in the sum.
    w8a8: the answer rounds as the kernel does, but an inner activation next to a tie can go the other way, by a
    step of 1/127 of its group's largest. Otherwise float32's 1e-5.
    """
    if activation_dtype is torch.bfloat16:
        return (6 + top_k) * 2**-9
    return 1 / 127 if form is Format.W8A8 else 1e-5


def find_linear_tolerance(form: Format, activation_dtype: torch.dtype) -> float:
    """As `find_tolerance`, for one product: bfloat16 rounds its result once, w8a8 its input."""
    if activation_dtype is torch.bfloat16:
        return 2**-8
    return 1 / 127 if form is Format.W8A8 else 1e-5


def check_layer(y_TD: Tensor, x_TD: Tensor, weights: LayerWeights, top_k: int, tolerance: float) -> float:
    """Compares the clearest few tokens with the float64 answer and returns the largest error as a share of the
    largest value. Raises `WrongResultError` above ``tolerance``."""
    margins_T = choose_experts(x_TD, weights.router_ED, top_k).margins_T
    token_ids = margins_T.topk(min(CHECKED_TOKENS, x_TD.shape[0])).indices
    x_ND = x_TD[token_ids]
    answer_ND = compute_answer(x_ND, weights, choose_experts(x_ND, weights.router_ED, top_k))
    return check_values(y_TD[token_ids], answer_ND, tolerance)


def check_values(y: Tensor, answer: Tensor, tolerance: float) -> float:
    """Returns max |y - answer| / max |answer|. Raises `WrongResultError` above ``tolerance`` and for NaN."""
    error = float((y.double() - answer).abs().max() / answer.abs().max())
    if not error <= tolerance:
        raise WrongResultError(
            f"the result differs from float64 by {error:.1e} of its largest value; the limit is {tolerance:.1e}"
        )
    return error
