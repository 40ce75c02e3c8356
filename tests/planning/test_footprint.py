"""A model's needs are those that it is later found to have."""

from __future__ import annotations

import pytest
import torch

from family_keys import VARIANT_KEYS
from model_folders import find_family
from moesys.inference import pages
from moesys.planning.footprint import (
    PAGE_TOKENS,
    Footprint,
    compute_kv_bytes_per_token,
    compute_state_bytes,
    round_to_pages,
)


@pytest.mark.parametrize("name", VARIANT_KEYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kv_bytes_are_what_the_pages_take(name: str, dtype: torch.dtype) -> None:
    mixers = find_family(VARIANT_KEYS[name]).read_config(VARIANT_KEYS[name]).mixers
    pool = pages.PagePool(mixers, 2, dtype=dtype, device=torch.device("cpu"))
    assert compute_kv_bytes_per_token(mixers, dtype.itemsize) * 2 * PAGE_TOKENS == pool.num_bytes


def test_pages_are_as_large_as_the_engines() -> None:
    assert PAGE_TOKENS == pages.PAGE_TOKENS
    assert [round_to_pages(n) for n in (1, 64, 65, 4096)] == [64, 64, 128, 4096]


def test_states_are_of_float32() -> None:
    class Scan:
        state_shapes = ((2, 3), (5,))

    assert compute_state_bytes([Scan(), Scan()]) == 2 * 4 * (6 + 5)  # pyrefly: ignore


def test_the_weights_are_the_core_and_every_section() -> None:
    footprint = Footprint(10, (3, 5, 4), 1)
    assert (footprint.weight_bytes, footprint.slot_bytes) == (22, 5)


def test_a_model_without_experts_needs_no_slot() -> None:
    assert Footprint(10, (), 1).slot_bytes == 0
