"""Checkpoints of transformers, each made once for all tests of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from oracle import Checkpoint


@pytest.fixture(scope="session")
def open_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Returns the checkpoint of a variant, which nobody may change."""

    @cache
    def open_once(name: str) -> Checkpoint:
        from oracle import save_theirs  # needs transformers, which need not be there

        return save_theirs(name, tmp_path_factory.mktemp(name))

    return open_once


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, open_checkpoint: Callable[[str], Checkpoint]) -> Checkpoint:
    """The checkpoint of the variant that the test is parametrised by, indirectly."""
    return open_checkpoint(request.param)
