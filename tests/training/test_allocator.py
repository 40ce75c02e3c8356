"""Freed memory stays with the process that asked for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moesys.training import allocator

_SCRIPT = """
import resource, runpy, sys
keep = runpy.run_path(sys.argv[1])["keep_freed_memory"]
if sys.argv[2] == "keep":
    assert keep()
for _ in range(20):
    block = bytearray(64 * 2**20)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_freed_blocks_are_not_faulted_in_again() -> None:
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", _SCRIPT, allocator.__file__, mode]))
        for mode in ("keep", "return")
    }
    assert faults["keep"] < faults["return"] / 4


def test_elsewhere_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
