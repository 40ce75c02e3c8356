"""Measured ceilings. Each costs a fraction of a second and is measured in the run that reports against it."""

from __future__ import annotations

import time

import torch

_SIZE = 2048
_MIN_SECONDS = 0.2


def measure_gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measures the best rate of a 2048 x 2048 x 2048 matrix product, in floating-point operations per second.

    Draws from a generator of its own: a measurement in the middle of a run leaves torch's random state alone.
    """
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(_SIZE, _SIZE, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    torch.mm(left, right.t(), out=product)
    best = float("inf")
    deadline = time.perf_counter() + _MIN_SECONDS
    while best == float("inf") or time.perf_counter() < deadline:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right.t(), out=product)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _SIZE**3 / best


def choose_faster_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 where its matrix product is at least 1.5 times as fast as float32's, else float32.

    CPUs with AMX or AVX512_BF16 multiply bfloat16 four times faster than float32; others four times slower.
    """
    ratio = measure_gemm_rate(torch.bfloat16, device) / measure_gemm_rate(torch.float32, device)
    return torch.bfloat16 if ratio >= 1.5 else torch.float32


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
