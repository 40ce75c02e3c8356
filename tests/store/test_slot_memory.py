"""Memory for weights and slots: in huge pages where the system gives them, and in ordinary ones where it does not."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import moesys.store.memory
from moesys.store import PartShape, SlotPool, allocate_weight

LARGE = (1024, 2048)


class NoHugePages(mmap.mmap):
    def madvise(self, *arguments: Any) -> None:
        raise OSError(22, "Invalid argument")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch allocates")
def test_a_system_without_huge_pages_gives_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moesys.store.memory.mmap, "mmap", NoHugePages)
    weight = allocate_weight(LARGE, torch.bfloat16)
    assert weight.fill_(2.0).sum(dtype=torch.float32) == 2.0 * 2**21


def test_slots_lie_in_such_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        asked.append(shape)
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr("moesys.store.slots.allocate_weight", allocate)
    pool = SlotPool(3, [PartShape((2, 5), torch.float32), PartShape((4,), torch.bfloat16)])
    assert asked == [(3, 2, 5), (3, 4)]
    assert (pool.slot_bytes, pool.num_bytes) == (48, 144)
