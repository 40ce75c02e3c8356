"""Measured ceilings. Each costs a fraction of a second and is measured in the run that reports against it."""

from __future__ import annotations

import time

import torch

from moesys.kernels import multiply, native

_SIZE = 2048
_MIN_SECONDS = 0.2
_READ_BYTES = 2**30
_NUM_READS = 8


def measure_gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measures the best rate of a 2048 x 2048 x 2048 matrix product, in floating-point operations per second.

    The product is the one that training uses, torch's or ours (`moesys.kernels.multiply`).

    Draws from a generator of its own: a measurement in the middle of a run leaves torch's random state alone.
    """
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(_SIZE, _SIZE, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    multiply(left, right.t(), product)
    best = float("inf")
    deadline = time.perf_counter() + _MIN_SECONDS
    while best == float("inf") or time.perf_counter() < deadline:
        _synchronize(device)
        start = time.perf_counter()
        multiply(left, right.t(), product)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _SIZE**3 / best


def measure_memory_read_rate() -> float:
    """Measures the best of eight reads of 1 GiB by all of torch's threads, in bytes per second."""
    buffer = torch.ones(_READ_BYTES // 4)
    read = native.read_memory if native.find_obstacle() is None else torch.max
    best = float("inf")
    for _ in range(_NUM_READS):
        start = time.perf_counter()
        read(buffer)
        best = min(best, time.perf_counter() - start)
    return _READ_BYTES / best


def choose_faster_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 where its matrix product is at least 1.5 times as fast as float32's, else float32.

    CPUs with AMX or AVX512_BF16 multiply bfloat16 four times faster than float32; others four times slower.
    """
    ratio = measure_gemm_rate(torch.bfloat16, device) / measure_gemm_rate(torch.float32, device)
    return torch.bfloat16 if ratio >= 1.5 else torch.float32


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
