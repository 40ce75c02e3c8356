"""A model's needs are those that it is later found to have."""

from __future__ import annotations

import pytest
import torch

from family_keys import VARIANT_KEYS
from model_folders import find_family
from moesys.inference.kv_cache import SequenceCache
from moesys.planning import Footprint, compute_kv_bytes_per_token


@pytest.mark.parametrize("name", VARIANT_KEYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kv_bytes_are_what_the_cache_allocates(name: str, dtype: torch.dtype) -> None:
    mixers = find_family(VARIANT_KEYS[name]).read_config(VARIANT_KEYS[name]).mixers
    cache = SequenceCache(mixers, 11, dtype, torch.device("cpu"))
    allocated = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert compute_kv_bytes_per_token(mixers, dtype.itemsize) * 11 == allocated


def test_the_weights_are_the_core_and_every_section() -> None:
    footprint = Footprint(10, (3, 5, 4), 1)
    assert (footprint.weight_bytes, footprint.slot_bytes) == (22, 5)


def test_a_model_without_experts_needs_no_slot() -> None:
    assert Footprint(10, (), 1).slot_bytes == 0
