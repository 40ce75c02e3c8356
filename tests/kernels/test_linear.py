"""The dense product in every format against float64 (law 1), and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesys.errors import KernelError, ShapeError
from moesys.kernels import Int8Product, Int8Weight, Kernel, linear, pack_int8
from moesys.kernels.formats import GROUP_SIZE
from moesys.kernels.linear.native import is_plain_call

FORMATS = ("float32", "bfloat16", "w8", "w8a8")
SIZES = ((1, 1, 1), (1, 64, 64), (5, 37, 19), (7, 300, 130), (13, 129, 257))


def draw(
    rows: int, columns: int, num_outputs: int, weight_format: str
) -> tuple[Tensor, Tensor | Int8Weight, Tensor]:
    generator = torch.Generator().manual_seed(rows * columns + num_outputs)
    x, weight, bias = (
        torch.randn(*shape, generator=generator)
        for shape in ((rows, columns), (num_outputs, columns), (num_outputs,))
    )
    if weight_format in list(Int8Product):
        return x, pack_int8(weight, Int8Product(weight_format)), bias
    return x, weight.to(getattr(torch, weight_format)), bias


def to_double(weight: Tensor | Int8Weight) -> Tensor | Int8Weight:
    return weight if isinstance(weight, Int8Weight) else weight.double()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("kernel", [Kernel.TORCH, Kernel.NATIVE], ids=str)
def test_equals_float64(kernel: Kernel, weight_format: str, size: tuple[int, int, int]) -> None:
    x, weight, bias = draw(*size, weight_format)
    oracle = linear(x.double(), to_double(weight), bias.double(), Kernel.REFERENCE)
    y = linear(x, weight, bias, kernel)
    assert y.dtype is torch.float32
    assert (y - oracle).abs().max() <= 1e-5 * oracle.abs().max()


@pytest.mark.parametrize("kernel", [Kernel.TORCH, Kernel.NATIVE], ids=str)
def test_int8_errs_by_at_most_half_a_scale_per_weight(kernel: Kernel) -> None:
    x, weight, _ = draw(6, 200, 30, "float32")
    assert isinstance(weight, Tensor)
    packed = pack_int8(weight)
    half_scales = packed.scales.repeat_interleave(GROUP_SIZE, dim=1)[:, :200] / 2
    bound = x.abs() @ half_scales.t()
    assert ((linear(x, packed, kernel=kernel) - x @ weight.t()).abs() <= bound * 1.0001 + 1e-5).all()


def test_gradients_go_through_torch_and_equal_float64() -> None:
    x, weight, bias = draw(4, 10, 6, "float32")
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(linear, tuple(leaves))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bf16_errs_by_at_most_1_5_of_torchs_error(size: tuple[int, int, int]) -> None:
    x, weight, _ = draw(*size, "bfloat16")
    assert isinstance(weight, Tensor)
    x = x.bfloat16()
    oracle = x.double() @ weight.double().t()
    ours, torchs = (
        (linear(x, weight, kernel=kernel).double() - oracle).abs().max()
        for kernel in (Kernel.NATIVE, Kernel.TORCH)
    )
    assert ours <= 1.5 * torchs + 1e-12


def test_leading_dimensions_stay() -> None:
    x, weight, _ = draw(6, 16, 5, "float32")
    y = linear(x.view(2, 3, 16), weight)
    assert y.shape == (2, 3, 5)
    assert torch.equal(y.view(6, 5), linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_and_bias_need_not_be_contiguous(dtype: torch.dtype) -> None:
    x, weight, bias = (tensor.to(dtype) for tensor in draw(6, 32, 5, "float32") if isinstance(tensor, Tensor))
    strided = [torch.stack([tensor, tensor + 1], dim=-1)[..., 0] for tensor in (x, bias)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert torch.equal(
        linear(strided[0], weight, strided[1], Kernel.NATIVE), linear(x, weight, bias, Kernel.NATIVE)
    )


def test_no_rows() -> None:
    _, weight, bias = draw(1, 16, 5, "w8a8")
    assert linear(torch.empty(0, 16), weight, bias).shape == (0, 5)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_row_with_nan_stays_that_rows_problem(weight_format: str) -> None:
    x, weight, bias = draw(7, 96, 20, weight_format)
    clean = linear(x, weight, bias, Kernel.NATIVE)
    x[3, 70] = float("nan")
    y = linear(x, weight, bias, Kernel.NATIVE)
    assert y[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("columns", [64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_bits_do_not_depend_on_other_rows_or_threads(
    dtype: torch.dtype, weight_format: str, columns: int
) -> None:
    if dtype is torch.bfloat16 and weight_format == "float32":
        pytest.skip("weights are not wider than activations")
    x, weight, bias = draw(512, columns, 70, weight_format)
    x, bias = x.to(dtype), bias.to(dtype)
    threads = torch.get_num_threads()
    whole = linear(x, weight, bias, Kernel.NATIVE)
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            for num_rows in (1, 2, 3, 5, 6, 7, 31, 64, 385, 511, 512):
                assert torch.equal(linear(x[:num_rows], weight, bias, Kernel.NATIVE), whole[:num_rows])
                assert torch.equal(linear(x[-num_rows:], weight, bias, Kernel.NATIVE), whole[-num_rows:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("weight_format", Int8Product)
@pytest.mark.parametrize("columns", [64, 200])
def test_bf16_rows_have_the_bits_of_the_same_rows_in_float32(weight_format: str, columns: int) -> None:
    x, weight, bias = draw(300, columns, 45, weight_format)
    half = x.bfloat16()
    y = linear(half, weight, bias.bfloat16(), Kernel.NATIVE)
    wide = linear(half.float(), weight, bias.bfloat16().float(), Kernel.NATIVE)
    assert torch.equal(y, wide.bfloat16())
    assert torch.equal(linear(half[:1], weight, bias.bfloat16(), Kernel.NATIVE), y[:1])


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_call_of_decoding_has_the_bits_of_any_other(dtype: torch.dtype, weight_format: str) -> None:
    x, weight, _ = draw(1, 100, 30, weight_format)
    weight = weight if isinstance(weight, Int8Weight) else weight.to(dtype)
    x = x.to(dtype)
    with torch.inference_mode():
        assert is_plain_call(x, weight)
        y = linear(x.view(1, 1, 100), weight)
    assert not is_plain_call(x, weight)
    assert y.shape == (1, 1, 30)
    assert torch.equal(y[0], linear(x, weight, torch.zeros(30, dtype=dtype), Kernel.NATIVE))


@torch.no_grad()
def test_what_a_glance_cannot_vouch_for_is_not_plain() -> None:
    x, weight, _ = draw(2, 64, 30, "float32")
    packed = pack_int8(weight)
    strided = Int8Weight(packed.values, torch.ones(1, 1).expand(30, 1), 64)
    for other in (
        weight.t(),
        weight[:, ::2],
        weight[:, :32],
        weight.double(),
        weight[0],
        weight[None],
        weight[0, 0],
    ):
        assert not is_plain_call(x, other)
    assert not is_plain_call(x, strided)
    assert not is_plain_call(x[:, :63], packed)
    assert not is_plain_call(x.t().contiguous().t(), weight)
    assert not is_plain_call(x.bfloat16(), weight)
    assert not is_plain_call(x.double(), weight.double())
    assert not is_plain_call(x.to("meta"), weight)
    assert not is_plain_call(x, weight.to("meta"))
    with torch.autocast("cpu"):
        assert not is_plain_call(x, weight)


def test_auto_is_native_without_gradients_and_torch_with() -> None:
    x, weight, bias = draw(9, 300, 40, "float32")
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), linear(x, weight, bias, Kernel.NATIVE))
    watched = x.clone().requires_grad_()
    assert linear(watched, weight, bias).requires_grad
    with pytest.raises(KernelError, match="no backward pass and a gradient is needed; choose auto, torch"):
        linear(watched, weight, bias, Kernel.NATIVE)


def test_the_environment_overrides_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = draw(9, 300, 40, "float32")
    monkeypatch.setenv("MOESYS_KERNEL", "reference")
    for gradients in (torch.enable_grad, torch.inference_mode):
        with gradients():
            assert torch.equal(linear(x, weight), linear(x, weight, kernel=Kernel.REFERENCE))
    monkeypatch.setenv("MOESYS_KERNEL", "fastest")
    with pytest.raises(
        KernelError, match="MOESYS_KERNEL is 'fastest'; valid values are auto, reference, torch, native"
    ):
        linear(x, weight)


def test_a_kernel_that_cannot_take_the_call_says_why() -> None:
    x, weight, _ = draw(2, 8, 3, "float32")
    with pytest.raises(
        KernelError, match=r"takes float32 or bfloat16 rows, x is torch\.float64; choose auto, torch"
    ):
        linear(x.double(), weight.double(), kernel=Kernel.NATIVE)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (
            torch.ones(2, 3, dtype=torch.int64),
            torch.ones(4, 3),
            None,
            "x must be floating point, got torch.int64",
        ),
        (torch.ones(2, 3), torch.ones(4, 5), None, r"as many columns as x \(2, 3\), got \(4, 5\)"),
        (
            torch.ones(2, 3),
            torch.ones(4, 3).double(),
            None,
            "x is torch.float32 but the weights are torch.float64",
        ),
        (torch.ones(2, 3), torch.ones(()), None, r"as many columns as x \(2, 3\), got \(\)"),
        (
            torch.ones(2, 3),
            torch.ones(4, 3),
            torch.ones(3),
            r"bias must be \(4,\) of torch.float32, got \(3,\)",
        ),
    ],
)
def test_bad_input(x: Tensor, weight: Tensor, bias: Tensor | None, message: str) -> None:
    for gradients in (torch.enable_grad, torch.inference_mode):
        with gradients(), pytest.raises(ShapeError, match=message):
            linear(x, weight, bias)
