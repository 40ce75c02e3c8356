"""The matrix product of training, by torch's library and by ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesys.kernels import Kernel, linear, multiply, native
from moesys.kernels.products import api

SIZES = ((1, 1, 1), (5, 7, 3), (200, 300, 70), (193, 257, 300), (6, 512, 64), (7, 1000, 65))


@pytest.fixture(params=["native", "torch"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MOESYS_KERNEL", request.param)
    return request.param


def draw(rows: int, columns: int, *, transposed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    if transposed:
        return torch.randn(columns, rows, generator=generator).t()
    return torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_float64(size: tuple[int, int, int], transposed: tuple[bool, bool]) -> None:
    rows, depth, columns = size
    left, right = draw(rows, depth, transposed=transposed[0]), draw(depth, columns, transposed=transposed[1])
    exact = left.double() @ right.double()
    out = torch.empty(rows, columns)
    assert multiply(left, right, out) is out
    start = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    added = multiply(left, right, start.clone(), adds=True)
    tolerance = 1e-5 * exact.abs().max()
    for actual, oracle in ((out, exact), (multiply(left, right), exact), (added, start.double() + exact)):
        assert (actual - oracle).abs().max() <= tolerance + 1e-6


def test_a_wide_out_keeps_what_is_beside_it() -> None:
    left, right = draw(20, 30, transposed=False), draw(30, 40, transposed=False)
    wide = torch.zeros(20, 100)
    multiply(left, right, wide[:, 10:50])
    assert torch.equal(wide[:, 10:50], multiply(left, right))
    assert not wide[:, :10].any()
    assert not wide[:, 50:].any()


@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty_matrices(size: tuple[int, int, int]) -> None:
    rows, depth, columns = size
    result = multiply(torch.ones(rows, depth), torch.ones(depth, columns))
    assert torch.equal(result, torch.zeros(rows, columns))


def test_which_library_computes(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    compute = native.compute_product
    monkeypatch.setattr(
        api.native, "compute_product", lambda *args, **options: (calls.append(1), compute(*args, **options))
    )
    multiply(torch.ones(2, 3), torch.ones(3, 4))
    multiply(torch.ones(2, 3).double(), torch.ones(3, 4).double())
    assert len(calls) == (1 if library == "native" else 0)


def test_linear_in_training_has_the_gradients_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_prefers_native", lambda override: True)
    x, weight, bias = (
        draw(33, 70, transposed=False),
        draw(20, 70, transposed=False),
        draw(20, 1, transposed=False)[:, 0],
    )
    upstream = draw(33, 20, transposed=False)
    gradients = []
    for dtype, kernel in ((torch.float32, Kernel.TORCH), (torch.float64, Kernel.REFERENCE)):
        leaves = [tensor.to(dtype).detach().clone().requires_grad_() for tensor in (x, weight, bias)]
        linear(*leaves, kernel=kernel).backward(upstream.to(dtype))
        gradients.append([leaf.grad for leaf in leaves])
    for ours, exact in zip(*gradients, strict=True):
        assert ours is not None
        assert exact is not None
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
