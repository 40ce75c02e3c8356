"""A process that was forked after native kernels ran on threads refuses them, instead of waiting for ever."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os, sys, torch
from moesys.errors import KernelError
from moesys.kernels import BankView, Kernel, Rows, compute_experts, linear, multiply, use_kernel

def compute_linear():
    return linear(torch.ones(64, 64), torch.ones(64, 64))

def compute_product():
    with use_kernel(Kernel.NATIVE):
        return multiply(torch.ones(64, 64), torch.ones(64, 64))

def compute_bank():
    rows = Rows(torch.ones(64, 64), torch.arange(64), torch.tensor([0, 64]))
    return compute_experts(rows, BankView(torch.ones(1, 128, 64), torch.ones(1, 64, 64)))

functions = {function.__name__: function for function in (compute_linear, compute_product, compute_bank)}
threads, first = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(threads)
if first != "nothing":
    functions[first]()
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    for function in functions.values():
        try:
            print("computed", function().isfinite().all().item(), flush=True)
        except KernelError as error:
            print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def fork(num_threads: int, first: str) -> list[str]:
    """What a child says of each kernel after its parent has called ``first``."""
    ended = subprocess.run(
        [sys.executable, "-c", CODE, str(num_threads), first],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return ended.stdout.splitlines()


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
@pytest.mark.parametrize("first", ["compute_linear", "compute_product", "compute_bank"])
def test_a_forked_child_refuses_native_kernels_and_says_how_to_start_it(first: str) -> None:
    said = fork(2, first)
    assert len(said) == 3
    assert all(
        "do not survive a fork; start worker processes with the method 'spawn'" in line for line in said
    )


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
@pytest.mark.parametrize(("num_threads", "first"), [(2, "nothing"), (1, "compute_linear")])
def test_a_child_computes_where_no_threads_were_lost(num_threads: int, first: str) -> None:
    assert fork(num_threads, first) == ["computed True"] * 3
