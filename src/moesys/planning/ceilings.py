"""Measured ceilings. Each costs a fraction of a second and is measured in the run that reports against it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from enum import StrEnum

import torch
from torch import Tensor

from moesys.kernels import linear, multiply, native
from moesys.kernels.formats import GROUP_SIZE, Int8Weight
from moesys.kernels.records import Weight

_SIZE = 2048
_MIN_SECONDS = 0.2
_READ_BYTES = 2**30
_NUM_READS = 8
_WEIGHT_BYTES = 2**29
"""Of distinct weights that a row passes through: more than caches hold."""
_NUM_WEIGHTS = 32
"""Of them that are timed together, long enough that no lucky moment is taken for the rate."""
_NUM_ROWS = 128
"""Of a product of many tokens: about what an expert gets of a prompt's pass."""


class WeightFormat(StrEnum):
    """How weights are stored in memory."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


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


def measure_weight_read_rate(weight_format: WeightFormat) -> float:
    """Measures how fast one row passes through weights, in bytes of weights per second: what decoding one token
    reaches with the kernels that it uses, where `measure_memory_read_rate` is what they could reach."""
    weights = [_make_weight(weight_format, _SIZE)]
    weight_bytes = _count_bytes(weights[0])
    weights += [_make_weight(weight_format, _SIZE) for _ in range(_WEIGHT_BYTES // weight_bytes)]
    row = _make_rows(weight_format, 1)
    passing = itertools.cycle(weights)

    def pass_through() -> None:
        for _ in range(_NUM_WEIGHTS):
            linear(row, next(passing))

    return _NUM_WEIGHTS * weight_bytes / _time_best(pass_through)


def measure_linear_rate(weight_format: WeightFormat) -> float:
    """Measures 128 rows times weights in such a format by the kernel that a prompt uses, in floating-point operations
    per second."""
    weight, rows = _make_weight(weight_format, _SIZE), _make_rows(weight_format, _NUM_ROWS)
    return 2 * _NUM_ROWS * _SIZE * _SIZE / _time_best(lambda: linear(rows, weight))


def _make_weight(weight_format: WeightFormat, size: int) -> Weight:
    match weight_format:
        case WeightFormat.FP32:
            return torch.ones(size, size)
        case WeightFormat.BF16:
            return torch.ones(size, size, dtype=torch.bfloat16)
        case WeightFormat.INT8:
            scales = torch.ones(size, -(-size // GROUP_SIZE))
            values = torch.ones(size, scales.shape[1] * GROUP_SIZE, dtype=torch.int8)
            return Int8Weight(values, scales, size)


def _make_rows(weight_format: WeightFormat, num_rows: int) -> Tensor:
    """Rows in the dtype of the models that have such weights."""
    return torch.ones(
        num_rows, _SIZE, dtype=torch.float32 if weight_format is WeightFormat.FP32 else torch.bfloat16
    )


def _count_bytes(weight: Weight) -> int:
    return weight.num_bytes if isinstance(weight, Int8Weight) else weight.nbytes


def _time_best(work: Callable[[], object]) -> float:
    """Returns the fewest seconds that it took, of as many times as fit."""
    best = float("inf")
    deadline = time.perf_counter() + _MIN_SECONDS
    while best == float("inf") or time.perf_counter() < deadline:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def choose_faster_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 where its matrix product is at least 1.5 times as fast as float32's, else float32.

    CPUs with AMX or AVX512_BF16 multiply bfloat16 four times faster than float32; others four times slower.
    """
    ratio = measure_gemm_rate(torch.bfloat16, device) / measure_gemm_rate(torch.float32, device)
    return torch.bfloat16 if ratio >= 1.5 else torch.float32


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
