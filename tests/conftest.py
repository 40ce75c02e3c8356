"""Shared by all tests: one thread, so that tests neither fight for cores nor depend on how many there are."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# Whether a change may land must not be a matter of luck: `make test` draws the same examples every time, and
# `make test-long` others.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("searching", derandomize=False)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests share one cache folder of their own and never touch the user's."""
    monkeypatch.setenv("MOESYS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
