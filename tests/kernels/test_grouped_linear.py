"""A matrix per group, in both orders in memory, against float64 (law 1); and a token's bits, which are its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesys.errors import KernelError, ShapeError
from moesys.kernels import Kernel, grouped_linear, linear
from moesys.kernels.choice import use_kernel

SIZES = (
    (1, 1, 1, 1),
    (1, 3, 16, 64),
    (5, 2, 37, 19),
    (7, 4, 130, 70),
    (13, 3, 129, 257),
    (0, 2, 8, 8),
    (3, 2, 8, 1),
)
ORDERS = ("rows", "columns")
DTYPES = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))


def draw(
    size: tuple[int, int, int, int], order: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor, Tensor]:
    """Both as the absorbed form of latent attention has them: a part of each head's query, and a part of each head's
    rows of one matrix, transposed for ``columns``."""
    tokens, groups, columns, outputs = size
    generator = torch.Generator().manual_seed(sum(size))
    x = torch.randn(tokens, groups, columns + 3, generator=generator)[..., :columns]
    if order == "rows":
        weight = torch.randn(groups, outputs + 2, columns, generator=generator)[:, 2:]
    else:
        weight = torch.randn(groups, columns + 2, outputs, generator=generator)[:, :columns].transpose(1, 2)
    return x.to(dtypes[0]), weight.to(dtypes[1])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_equals_float64(
    size: tuple[int, int, int, int], order: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x, weight = draw(size, order, dtypes)
    oracle = grouped_linear(x.double(), weight.double(), Kernel.REFERENCE)
    torchs = grouped_linear(x, weight, Kernel.TORCH)
    ours = grouped_linear(x, weight, Kernel.NATIVE)
    assert ours.dtype is torchs.dtype is x.dtype
    assert ours.shape == torchs.shape == oracle.shape == (*x.shape[:2], weight.shape[1])
    if not x.numel():
        return
    if x.dtype is torch.float32:
        for y in (ours, torchs):
            assert (y - oracle).abs().max() <= 1e-5 * oracle.abs().max()
    else:
        assert (ours - oracle).abs().max() <= 1.5 * (torchs - oracle).abs().max()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_contiguous_rows_give_the_bits_of_linear_per_group(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, weight = draw((23, 4, 130, 70), "rows", dtypes)
    y = grouped_linear(x, weight, Kernel.NATIVE)
    for group in range(4):
        expected = linear(x[:, group].contiguous(), weight[group].contiguous(), kernel=Kernel.NATIVE)
        assert torch.equal(y[:, group], expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_tokens_bits_do_not_depend_on_other_tokens_or_threads(
    order: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x, weight = draw((400, 3, 130, 150), order, dtypes)
    threads = torch.get_num_threads()
    whole = grouped_linear(x, weight, Kernel.NATIVE)
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for num_tokens in (1, 2, 3, 5, 6, 7, 8, 9, 31, 385, 400):
                assert torch.equal(grouped_linear(x[:num_tokens], weight, Kernel.NATIVE), whole[:num_tokens])
                assert torch.equal(
                    grouped_linear(x[-num_tokens:], weight, Kernel.NATIVE), whole[-num_tokens:]
                )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("order", ORDERS)
def test_nan_stays_with_its_token_and_group(order: str) -> None:
    x, weight = draw((7, 3, 20, 21), order, DTYPES[0])
    clean = grouped_linear(x, weight, Kernel.NATIVE)
    x[4, 1, 19] = float("nan")
    y = grouped_linear(x, weight, Kernel.NATIVE)
    assert y[4, 1].isnan().all()
    clean[4, 1] = y[4, 1] = 0
    assert torch.equal(y, clean)


@pytest.mark.parametrize("kernel", [Kernel.AUTO, Kernel.TORCH, Kernel.REFERENCE], ids=str)
def test_gradients_equal_float64(kernel: Kernel) -> None:
    x, weight = (part.double().requires_grad_() for part in draw((4, 2, 5, 3), "columns", DTYPES[0]))
    assert torch.autograd.gradcheck(lambda x, weight: grouped_linear(x, weight, kernel), (x, weight))


def test_auto_is_native_without_gradients_and_torch_with() -> None:
    x, weight = draw((9, 2, 300, 40), "columns", DTYPES[0])
    native = grouped_linear(x, weight, Kernel.NATIVE)
    with torch.inference_mode():
        assert torch.equal(grouped_linear(x, weight), native)
        with use_kernel(Kernel.REFERENCE):
            assert torch.equal(grouped_linear(x, weight), grouped_linear(x, weight, Kernel.REFERENCE))
    assert not torch.equal(native, grouped_linear(x, weight, Kernel.REFERENCE))
    watched = x.clone().requires_grad_()
    assert grouped_linear(watched, weight).requires_grad
    with pytest.raises(KernelError, match="no backward pass and a gradient is needed; choose auto, torch"):
        grouped_linear(watched, weight, Kernel.NATIVE)


def test_what_native_does_not_take_is_said() -> None:
    x, weight = draw((2, 2, 8, 6), "rows", DTYPES[0])
    scattered = torch.stack([weight, weight], dim=-1)[..., 0]
    with pytest.raises(
        KernelError, match="takes matrices with contiguous rows or columns; choose auto, torch"
    ):
        grouped_linear(x, scattered, Kernel.NATIVE)
    assert torch.equal(grouped_linear(x, scattered), grouped_linear(x, scattered, Kernel.TORCH))
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(
        grouped_linear(strided, weight, Kernel.NATIVE), grouped_linear(x, weight, Kernel.NATIVE)
    )


@torch.inference_mode()
def test_in_a_compiler_torch_computes() -> None:
    x, weight = draw((2, 2, 8, 6), "rows", DTYPES[0])
    compiled = torch.compile(grouped_linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), grouped_linear(x, weight, Kernel.TORCH))


def test_what_does_not_fit_is_refused() -> None:
    x, weight = draw((2, 3, 8, 6), "rows", DTYPES[0])
    for other in (weight[:2], weight[..., :7], weight[0]):
        with pytest.raises(ShapeError, match=r"\(tokens, groups, columns\) and the weight"):
            grouped_linear(x, other)
    for one, other in ((x, weight.double()), (x.bfloat16(), weight), (x.long(), weight)):
        with pytest.raises(ShapeError, match="cast x to the dtype of the weights"):
            grouped_linear(one, other)
