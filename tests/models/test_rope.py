"""Rotary embeddings: every kind of stretching against its formula in plain Python, and what turning does."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.models import LinearScaling, Llama3Scaling, LongRopeScaling, RopeConfig, YarnScaling
from moesys.models.rope import Scaling, compute_frequencies
from moesys.models.rotary import apply_rotation, compute_rotation

THETA, DIM = 10000.0, 16
ORIGINAL = 64
Formula = Callable[[float, int], tuple[float, float]]
"""From a plain frequency and the number of its pair to the stretched one and the factor of cosines and sines."""


def stretch_llama3(base: float, _: int) -> tuple[float, float]:
    wave = 2 * math.pi / base
    if wave < ORIGINAL / 4:
        return base, 1.0
    if wave > ORIGINAL / 1:
        return base / 8, 1.0
    share = (ORIGINAL / wave - 1) / (4 - 1)
    return (1 - share) * base / 8 + share * base, 1.0


def make_yarn_formula(fast: float, slow: float, *, truncates: bool, attention: float) -> Formula:
    def find(rotations: float) -> float:
        return DIM * math.log(ORIGINAL / (rotations * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = find(fast), find(slow)
    if truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, DIM - 1)
    width = high - low or 0.001

    def stretch(base: float, pair: int) -> tuple[float, float]:
        ramp = min(max((pair - low) / width, 0.0), 1.0)
        return base / 4 * ramp + base * (1 - ramp), attention

    return stretch


SHORT, LONG = tuple(1.0 + i / 8 for i in range(8)), (7.0,) * 8
MILD = 0.1 * math.log(4) + 1

CASES: dict[str, tuple[Scaling | None, Formula]] = {
    "default": (None, lambda base, _: (base, 1.0)),
    "linear": (LinearScaling(4.0), lambda base, _: (base / 4, 1.0)),
    "llama3": (Llama3Scaling(8.0, 1.0, 4.0, ORIGINAL), stretch_llama3),
    "yarn": (YarnScaling(4.0, ORIGINAL), make_yarn_formula(32, 1, truncates=True, attention=MILD)),
    "yarn-untruncated": (
        YarnScaling(4.0, ORIGINAL, beta_fast=8.0, beta_slow=2.0, truncates=False),
        make_yarn_formula(8, 2, truncates=False, attention=MILD),
    ),
    "yarn-one-border": (
        YarnScaling(4.0, ORIGINAL, beta_fast=1.0, beta_slow=1.0, truncates=False),
        make_yarn_formula(1, 1, truncates=False, attention=MILD),
    ),
    "yarn-borders-outside": (
        YarnScaling(4.0, ORIGINAL, beta_fast=20.0, beta_slow=1e-9),
        make_yarn_formula(20, 1e-9, truncates=True, attention=MILD),
    ),
    "yarn-attention-factor": (
        YarnScaling(4.0, ORIGINAL, attention_factor=1.7, mscale=1.0, mscale_all_dim=0.5),
        make_yarn_formula(32, 1, truncates=True, attention=1.7),
    ),
    "yarn-two-mscales": (
        YarnScaling(4.0, ORIGINAL, mscale=0.7, mscale_all_dim=0.5),
        make_yarn_formula(
            32, 1, truncates=True, attention=(0.07 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
        ),
    ),
    "yarn-one-mscale": (
        YarnScaling(4.0, ORIGINAL, mscale=0.7),
        make_yarn_formula(32, 1, truncates=True, attention=MILD),
    ),
    "longrope": (
        LongRopeScaling(SHORT, LONG, ORIGINAL, factor=4.0),
        lambda base, pair: (base / SHORT[pair], math.sqrt(1 + math.log(4) / math.log(ORIGINAL))),
    ),
    "longrope-own-factor": (
        LongRopeScaling(SHORT, LONG, ORIGINAL, factor=4.0, short_attention_factor=1.2),
        lambda base, pair: (base / SHORT[pair], 1.2),
    ),
    "longrope-not-longer": (
        LongRopeScaling(SHORT, LONG, ORIGINAL, factor=1.0),
        lambda base, pair: (base / SHORT[pair], 1.0),
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_frequencies_equal_the_formula(kind: str) -> None:
    scaling, stretch = CASES[kind]
    frequencies, factor = compute_frequencies(RopeConfig(DIM, THETA, scaling))
    wanted = [stretch(THETA ** (-2 * pair / DIM), pair) for pair in range(DIM // 2)]
    assert frequencies.dtype == torch.float32
    assert frequencies.tolist() == pytest.approx([frequency for frequency, _ in wanted], rel=1e-5)
    assert factor == pytest.approx(wanted[0][1], rel=1e-12)


def test_every_kind_stretches_otherwise() -> None:
    computed = {
        (tuple(frequencies.tolist()), factor)
        for scaling, _ in CASES.values()
        for frequencies, factor in [compute_frequencies(RopeConfig(DIM, THETA, scaling))]
    }
    assert len(computed) == len(CASES) - 1  # one mscale alone is ignored


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("kind", [kind for kind in CASES if kind not in ("default", "longrope-own-factor")])
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from moesys.models.families.rope_keys import read_rope, write_rope

    rope = RopeConfig(DIM, THETA, CASES[kind][0])
    keys = write_rope(rope, max_positions=4 * ORIGINAL)
    assert read_rope({**keys, "max_position_embeddings": 4 * ORIGINAL}, DIM) == rope
    parameters = {name: value for name, value in keys["rope_parameters"].items() if value is not None}
    config = LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        head_dim=DIM,
        max_position_embeddings=4 * ORIGINAL,
        rope_parameters=parameters,
    )
    theirs, their_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
        config, torch.device("cpu"), seq_len=1
    )
    frequencies, factor = compute_frequencies(rope)
    torch.testing.assert_close(frequencies, theirs, rtol=1e-6, atol=0)
    assert factor == pytest.approx(their_factor)


def make_heads(size: int = DIM) -> Tensor:
    return torch.randn(2, 5, 3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rotate(x: Tensor, rope: RopeConfig, start: int = 0) -> Tensor:
    positions = torch.arange(start, start + x.shape[1]).expand(x.shape[:2])
    return apply_rotation(x, compute_rotation(positions, rope), rope)


def test_pairs_turn_as_complex_numbers() -> None:
    x, rope = make_heads(), RopeConfig(DIM, THETA, YarnScaling(4.0, ORIGINAL))
    frequencies, factor = compute_frequencies(rope)
    angles = (torch.arange(3.0, 8.0)[:, None] * frequencies).double()[:, None]
    first, second = x.chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.full_like(angles, factor), angles)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, rope, start=3), expected, rtol=1e-6, atol=1e-6)


def test_interleaved_pairs_are_half_split_ones_of_permuted_elements() -> None:
    x = make_heads()
    permuted = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    interleaved = rotate(x, RopeConfig(DIM, is_interleaved=True), start=3)
    assert torch.equal(interleaved, rotate(permuted, RopeConfig(DIM), start=3))
    assert not torch.allclose(interleaved, rotate(x, RopeConfig(DIM), start=3))


def test_interleaved_scores_are_those_of_pairs_that_stay_in_place() -> None:
    """Queries and keys come out in the same other order, which their products do not see."""
    q, k = make_heads(), make_heads().flip(1)
    frequencies, _ = compute_frequencies(RopeConfig(DIM))
    angles = (torch.arange(5.0)[:, None] * frequencies).double()[:, None]
    in_place = [
        torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(()).double(), angles)
        )
        for x in (q, k)
    ]
    expected = torch.einsum("bqhpc,bkhpc->bhqk", *in_place)
    turned = [rotate(x, RopeConfig(DIM, is_interleaved=True)) for x in (q, k)]
    torch.testing.assert_close(torch.einsum("bqhd,bkhd->bhqk", *turned), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_the_rest_of_a_head_is_left_alone(is_interleaved: bool) -> None:
    x, rope = make_heads(DIM + 6), RopeConfig(DIM, is_interleaved=is_interleaved)
    turned = rotate(x, rope, start=3)
    assert torch.equal(turned[..., DIM:], x[..., DIM:])
    assert torch.equal(turned[..., :DIM], rotate(x[..., :DIM], rope, start=3))


def test_scores_depend_on_distances_only() -> None:
    for scaling, _ in CASES.values():
        rope = RopeConfig(DIM, THETA, scaling)
        near, far = (
            torch.einsum(
                "bqhd,bkhd->bhqk", rotate(make_heads(), rope, s), rotate(make_heads().flip(1), rope, s)
            )
            for s in (0, 50)
        )
        torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


def test_only_longrope_ends() -> None:
    limits = {kind: RopeConfig(DIM, THETA, scaling).max_positions for kind, (scaling, _) in CASES.items()}
    assert {kind for kind, limit in limits.items() if limit is not None} == {
        kind for kind in CASES if "longrope" in kind
    }
    assert limits["longrope"] == ORIGINAL


def test_positions_beyond_its_end_are_refused() -> None:
    """Positions count, not tokens: documents that are packed start again."""
    rope = RopeConfig(DIM, THETA, CASES["longrope"][0])
    compute_rotation(torch.arange(ORIGINAL).repeat(1, 3), rope)
    compute_rotation(torch.zeros(1, 0, dtype=torch.int64), rope)
    with pytest.raises(ShapeError, match=r"position 64 lies beyond the original context \(64 tokens\)"):
        compute_rotation(torch.arange(ORIGINAL + 1)[None], rope)
    compute_rotation(torch.arange(10 * ORIGINAL)[None], RopeConfig(DIM, THETA, CASES["yarn"][0]))


def test_longrope_needs_a_factor_per_pair() -> None:
    for short, long in (((1.0,) * 7, LONG), (SHORT, (1.0,) * 9)):
        with pytest.raises(
            ShapeError, match=r"one factor per pair of the 16 rotary dimensions \(8\), got [79]"
        ):
            RopeConfig(DIM, THETA, LongRopeScaling(short, long, ORIGINAL, 4.0))
