"""Sampling against a slow oracle that filters one token at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.errors import GenerationError
from moesys.inference import SamplingParams
from moesys.inference.sampling import _keep, draw_uniform, sample_token

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
NUM_DRAWS = 3000


def compute_probabilities(logits: list[float], params: SamplingParams, seen: set[int]) -> list[float]:
    """The definition, in plain Python."""
    penalty = params.repetition_penalty
    for i in seen:
        logits = [
            *logits[:i],
            logits[i] / penalty if logits[i] > 0 else logits[i] * penalty,
            *logits[i + 1 :],
        ]
    weights = [math.exp((x - max(logits)) / params.temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    order = order[: params.top_k]
    total, reached, nucleus = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if reached < params.top_p * total:
            nucleus.append(i)
        reached += weights[i]
    kept = [i for i in nucleus if weights[i] >= params.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


def count_draws(params: SamplingParams, seen: list[int]) -> torch.Tensor:
    ids = [sample_token(LOGITS, params, position, seen) for position in range(NUM_DRAWS)]
    return torch.bincount(torch.tensor(ids), minlength=LOGITS.shape[0])


@pytest.mark.parametrize(
    ("settings_", "seen"),
    [
        ({}, []),
        ({"temperature": 2.5, "seed": 3}, []),
        ({"temperature": 0.7}, []),
        ({"top_k": 1}, []),
        ({"top_k": 2}, []),
        ({"top_k": 99}, []),
        ({"top_p": 0.6}, []),
        ({"top_p": 0.7}, []),
        ({"top_p": 1e-9}, []),
        ({"min_p": 0.3}, []),
        ({"top_k": 2, "top_p": 0.72}, []),
        ({"top_k": 3, "top_p": 0.95, "min_p": 0.2}, []),
        ({"repetition_penalty": 2.0}, [1, 1, 4]),
        ({"repetition_penalty": 0.5, "min_p": 0.1}, [3]),
    ],
)
def test_draws_follow_the_definition(settings_: dict[str, Any], seen: list[int]) -> None:
    params = SamplingParams(**{"temperature": 1.0} | settings_)
    expected = torch.tensor(compute_probabilities(LOGITS.tolist(), params, set(seen))) * NUM_DRAWS
    found = count_draws(params, seen)
    assert torch.equal(found > 0, expected > 0)
    kept = expected > 0
    chi_square = ((found - expected)[kept] ** 2 / expected[kept]).sum()
    # 99.9 % of chi-square with 4 degrees of freedom; the draws are fixed by the seed.
    assert chi_square < 18.5


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=8, unique=True),
    top_k=st.none() | st.integers(1, 9),
    top_p=st.integers(1, 100).map(lambda n: n / 100),
    min_p=st.integers(0, 99).map(lambda n: n / 100),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
)
def test_nothing_that_was_filtered_is_drawn(
    logits: list[float], top_k: int | None, top_p: float, min_p: float, temperature: float
) -> None:
    params = SamplingParams(temperature, top_k, top_p, min_p)
    probabilities = compute_probabilities(logits, params, set())
    drawn = {sample_token(torch.tensor(logits), params, position, []) for position in range(20)}
    assert all(probabilities[i] > 0 for i in drawn)


def make_long_tail(num_likely: int, num_unlikely: int, likely_mass: float) -> torch.Tensor:
    """Logits of which the unlikely ones hold what the likely ones leave, each a little less than the one before."""
    weights = torch.cat(
        [
            torch.full((num_likely,), likely_mass / num_likely),
            torch.full((num_unlikely,), (1 - likely_mass) / num_unlikely),
        ]
    )
    slopes = torch.linspace(1.0, 0.97, num_likely + num_unlikely)
    return (weights * slopes).log()[torch.randperm(len(weights), generator=torch.Generator().manual_seed(2))]


@pytest.mark.parametrize(
    "settings_",
    [
        {"top_p": 0.9},
        {"top_p": 0.97},
        {"top_p": 0.5},
        {"top_p": 0.9, "min_p": 0.3},
        {"top_k": 60, "top_p": 0.9},
        {"top_k": 2000, "top_p": 0.9},
        {"top_k": 5000, "top_p": 0.9},
    ],
)
def test_of_a_large_vocabulary_just_what_the_definition_keeps_is_kept(settings_: dict[str, Any]) -> None:
    logits = make_long_tail(100, 1900, 0.956)
    params = SamplingParams(**{"temperature": 1.0} | settings_)
    expected = torch.tensor(compute_probabilities(logits.tolist(), params, set()))
    probs, ids = _keep(logits.softmax(dim=-1), params)
    assert ids is not None
    assert set(ids[: len(probs)].tolist()) == set(expected.nonzero().squeeze(1).tolist())
    found = torch.zeros(len(logits)).index_copy(0, ids[: len(probs)], (probs / probs.sum()).float())
    assert torch.allclose(found, expected.float(), rtol=1e-4, atol=0)


def test_temperature_zero_takes_the_best_and_ties_go_to_the_lower_id() -> None:
    greedy = SamplingParams(temperature=0.0)
    assert sample_token(LOGITS, greedy, 0, []) == 1
    assert sample_token(torch.tensor([1.0, 5.0, 5.0]), greedy, 0, []) == 1
    assert sample_token(LOGITS, SamplingParams(temperature=0.0, repetition_penalty=2.0), 0, [1]) == 3


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-310])
def test_tiny_temperatures_take_the_best(temperature: float) -> None:
    assert sample_token(LOGITS * 1e4, SamplingParams(temperature=temperature), 0, []) == 1


def test_the_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([4.0, -1.0, 1.9, -1.5])
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert sample_token(logits, params, 0, [0]) == 0
    assert sample_token(logits[2:], params, 0, [0]) == 0
    assert sample_token(logits[[1, 3]], params, 0, [0]) == 1
    assert logits.tolist() == pytest.approx([4.0, -1.0, 1.9, -1.5])


def test_a_draw_is_a_function_of_seed_and_position_alone() -> None:
    params = SamplingParams(temperature=1.0, seed=5)
    first = [sample_token(LOGITS, params, i, []) for i in range(50)]
    torch.rand(3)
    assert first == [sample_token(LOGITS, params, i, []) for i in reversed(range(50))][::-1]
    for seed in (6, -5, 5 + 2**32, 5 + 2**64):
        assert first != [sample_token(LOGITS, SamplingParams(1.0, seed=seed), i, []) for i in range(50)]


def test_uniform_numbers_of_neighbouring_seeds_and_positions_are_even_and_unlike() -> None:
    table = torch.tensor(
        [[draw_uniform(seed, position) for position in range(64)] for seed in range(64)]
    ).double()
    assert 0 <= table.min() < 0.01
    assert 0.99 < table.max() < 1
    assert (table.flatten().histc(16, 0, 1) - 256).abs().max() < 64
    centred = table - 0.5
    assert (centred[1:] * centred[:-1]).mean().abs() < 0.006
    assert (centred[:, 1:] * centred[:, :-1]).mean().abs() < 0.006


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("logits", "named"),
    [([0.0, math.nan, 1.0], "nan"), ([0.0, math.inf], "inf"), ([-math.inf, -math.inf], "-inf")],
)
def test_logits_that_are_not_numbers_are_an_error(
    logits: list[float], named: str, temperature: float
) -> None:
    with pytest.raises(GenerationError, match=f"the largest logit of the token at position 7 is {named};"):
        sample_token(torch.tensor(logits), SamplingParams(temperature), 7, [])


def test_minus_infinity_is_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf])
    assert {sample_token(logits, SamplingParams(3.0), i, []) for i in range(50)} == {1}


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"temperature": -1.0}, r"temperature \(-1.0\) must be 0 or more"),
        ({"temperature": math.nan}, r"temperature \(nan\) must be 0 or more"),
        ({"temperature": math.inf}, r"temperature \(inf\) must be 0 or more, and finite"),
        ({"top_k": 0}, r"top_k \(0\) must be 1 or more"),
        ({"top_p": 0.0}, r"top_p \(0.0\) must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p \(1.1\) must be in \(0, 1\]"),
        ({"top_p": math.nan}, r"top_p \(nan\)"),
        ({"min_p": 1.0}, r"min_p \(1.0\) must be in \[0, 1\)"),
        ({"min_p": -0.1}, r"min_p \(-0.1\)"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty \(0.0\) must be more than 0"),
        ({"repetition_penalty": math.inf}, r"repetition_penalty \(inf\)"),
        ({"temperature": 0.0, "top_k": 3}, "no effect at temperature 0"),
        ({"temperature": 0.0, "top_p": 0.5}, "no effect at temperature 0"),
        ({"temperature": 0.0, "min_p": 0.5}, "no effect at temperature 0"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        SamplingParams(**settings_)
