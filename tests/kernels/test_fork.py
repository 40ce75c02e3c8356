"""A process that was forked after native kernels ran on threads refuses more than one, instead of waiting for ever."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork")

CODE = """
import os, signal, sys, torch
from moesys.errors import KernelError
from moesys.kernels import BankView, Kernel, Rows, compute_experts, linear, multiply, native, use_kernel

def compute_linear():
    return linear(torch.ones(64, 64), torch.ones(64, 64))

def compute_product():
    with use_kernel(Kernel.NATIVE):
        return multiply(torch.ones(64, 64), torch.ones(64, 64))

def compute_bank():
    rows = Rows(torch.ones(64, 64), torch.arange(64), torch.tensor([0, 64]))
    return compute_experts(rows, BankView(torch.ones(1, 128, 64), torch.ones(1, 64, 64)))

def read_memory():
    return torch.tensor(native.read_memory(torch.ones(4096)))

functions = {
    function.__name__: function for function in (compute_linear, compute_product, compute_bank, read_memory)
}
parent_threads, first, child_threads = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(parent_threads)
if first != "nothing":
    functions[first]()
child = os.fork()
if child == 0:
    signal.alarm(20)
    torch.set_num_threads(child_threads)
    for function in functions.values():
        try:
            print("computed", function().isfinite().all().item(), flush=True)
        except KernelError as error:
            print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def fork(parent_threads: int, first: str, child_threads: int = 2) -> list[str]:
    """What a child says of each kernel after its parent has called ``first``."""
    ended = subprocess.run(
        [sys.executable, "-c", CODE, str(parent_threads), first, str(child_threads)],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return ended.stdout.splitlines()


@pytest.mark.parametrize("first", ["compute_linear", "compute_product", "compute_bank", "read_memory"])
def test_a_forked_child_refuses_native_kernels_and_says_how_to_start_it(first: str) -> None:
    said = fork(2, first)
    assert len(said) == 4
    assert all(
        "do not survive a fork; call torch.set_num_threads(1) in this process, or start it with the method 'spawn'"
        in line
        for line in said
    )


@pytest.mark.parametrize(
    ("parent_threads", "first", "child_threads"),
    [(2, "nothing", 2), (1, "compute_linear", 2), (2, "compute_bank", 1)],
    ids=["none started", "one started", "one needed"],
)
def test_a_child_computes_where_no_thread_that_it_needs_was_lost(
    parent_threads: int, first: str, child_threads: int
) -> None:
    assert fork(parent_threads, first, child_threads) == ["computed True"] * 4
