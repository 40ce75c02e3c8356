"""Whose wish decides which kernel computes, what ``torch`` means, and what is said when ``auto`` takes a slower one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from expert_cases import MIXED, compute, make_case
from torch import Tensor

from moesys.errors import KernelError
from moesys.kernels import (
    Kernel,
    choice,
    compute_experts,
    linear,
    linear_cross_entropy,
    multiply,
    native,
    use_kernel,
)
from moesys.kernels.choice import Obstacle, choose_kernel, hold_environment, is_torch_certain, read_wish
from moesys.kernels.products import api as products
from moesys.moe import Execution, LocalDispatcher, MoEConfig, MoELayer, ResidentSource

NATIVE_FUNCTIONS = (
    "choose_and_weigh", "choose_top_k", "compute_experts", "compute_experts_summed", "compute_linear",
    "compute_product", "compute_rms_norm", "compute_rms_norm_pair", "group_by_expert", "rotate_pairs", "sum_rows",
    "weigh_choice",
)  # fmt: skip


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The native functions that were called, on a machine where training prefers native products."""
    calls: list[str] = []

    def watch(name: str) -> None:
        function = getattr(native, name)

        def record(*args: object, **options: object) -> object:
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(native, name, record)

    for name in NATIVE_FUNCTIONS:
        watch(name)
    monkeypatch.setattr(native, "is_half_used_by_mkl", lambda: True)
    products._prefers_native.cache_clear()
    yield calls
    products._prefers_native.cache_clear()


def choose(asked: Kernel) -> Kernel:
    return choose_kernel("nothing", asked, dict.fromkeys(list(Kernel)[1:], lambda: None))


def test_an_argument_comes_before_use_kernel_and_that_before_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose(Kernel.AUTO) is Kernel.REFERENCE
    monkeypatch.setenv("MOESYS_KERNEL", "native")
    assert choose(Kernel.AUTO) is Kernel.NATIVE
    with use_kernel(Kernel.TORCH):
        assert choose(Kernel.AUTO) is Kernel.TORCH
        assert choose(Kernel.REFERENCE) is Kernel.REFERENCE
        with use_kernel(Kernel.REFERENCE):
            assert choose(Kernel.AUTO) is Kernel.REFERENCE
        with use_kernel(Kernel.AUTO):
            assert choose(Kernel.AUTO) is Kernel.TORCH
    assert choose(Kernel.AUTO) is Kernel.NATIVE


def test_use_kernel_ends_with_an_exception_and_stays_in_its_thread() -> None:
    seen = []
    with pytest.raises(RuntimeError, match="stop"), use_kernel(Kernel.REFERENCE):  # noqa: PT012
        other = threading.Thread(target=lambda: seen.append(read_wish()))
        other.start()
        other.join()
        raise RuntimeError("stop")
    assert seen == [Kernel.AUTO]
    assert read_wish() is Kernel.AUTO


def test_torch_is_certain_while_no_thread_wishes_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    with use_kernel(Kernel.TORCH), use_kernel(Kernel.TORCH):
        assert is_torch_certain()
        with pytest.raises(RuntimeError, match="stop"), use_kernel(Kernel.NATIVE), use_kernel(Kernel.NATIVE):  # noqa: PT012
            with use_kernel(Kernel.TORCH):
                other = threading.Thread(target=lambda: seen.append(is_torch_certain()))
                other.start()
                other.join()
            raise RuntimeError("stop")
        assert is_torch_certain()
    assert seen == [False]
    assert is_torch_certain()
    monkeypatch.setenv("MOESYS_KERNEL", "native")
    with use_kernel(Kernel.TORCH):
        assert not is_torch_certain()


def test_use_kernel_reaches_linear_and_refuses_what_it_cannot_do() -> None:
    x, weight = torch.randn(9, 300), torch.randn(40, 300)
    with use_kernel(Kernel.REFERENCE):
        assert torch.equal(linear(x, weight), linear(x, weight, kernel=Kernel.REFERENCE))
    with (
        use_kernel(Kernel.NATIVE),
        pytest.raises(KernelError, match="'native' cannot compute linear: it has no"),
    ):
        linear(x.requires_grad_(), weight)


def train_linear(kernel: Kernel) -> Callable[[], Tensor]:
    leaves = [torch.randn(8, 70, requires_grad=True), torch.randn(20, 70, requires_grad=True)]
    return lambda: linear(*leaves, kernel=kernel).sum()


def train_experts(kernel: Kernel) -> Callable[[], Tensor]:
    case = make_case(*MIXED, dtype=torch.float32)
    for leaf in case.list_leaves().values():
        leaf.requires_grad_()
    return lambda: compute(case, kernel, summed=True).sum()


TRAININGS = [train_linear, train_experts]


@pytest.mark.parametrize("train", TRAININGS)
def test_auto_trains_with_the_faster_product(
    train: Callable[[Kernel], Callable[[], Tensor]], native_calls: list[str]
) -> None:
    loss = train(Kernel.AUTO)()
    forward = len(native_calls)
    loss.backward()
    assert 0 < forward < len(native_calls)


@pytest.mark.parametrize("train", TRAININGS)
def test_torch_means_torch_alone_in_both_passes(
    train: Callable[[Kernel], Callable[[], Tensor]],
    native_calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(Kernel.TORCH)().backward()
    with use_kernel(Kernel.TORCH):
        loss = train(Kernel.AUTO)()
    loss.backward()
    with torch.no_grad():
        train(Kernel.TORCH)()
    monkeypatch.setenv("MOESYS_KERNEL", "torch")
    train(Kernel.AUTO)().backward()
    assert not native_calls


@pytest.mark.parametrize("train", TRAININGS)
def test_a_backward_pass_follows_the_kernel_in_use_around_it(
    train: Callable[[Kernel], Callable[[], Tensor]], native_calls: list[str]
) -> None:
    """On a CPU autograd computes in the thread that calls it."""
    loss = train(Kernel.AUTO)()
    native_calls.clear()
    with use_kernel(Kernel.TORCH):
        loss.backward()
    assert not native_calls


def test_the_kernel_of_an_execution_computes_the_whole_layer(native_calls: list[str]) -> None:
    config = MoEConfig(num_experts=4, top_k=2, intermediate_size=8, shared_intermediate_size=8)
    layer, x = MoELayer(16, config), torch.randn(3, 16)
    execution = Execution(LocalDispatcher(), ResidentSource({0: layer.experts}))
    with torch.no_grad():
        layer(x, execution)
        steps = {
            "choose_and_weigh",
            "group_by_expert",
            "compute_experts_summed",
            "compute_linear",
        }
        assert set(native_calls) == steps
        native_calls.clear()
        layer(x, replace(execution, kernel=Kernel.TORCH))
        assert not native_calls
        with use_kernel(Kernel.TORCH):
            layer(x, replace(execution, kernel=Kernel.NATIVE))
        assert set(native_calls) == steps


def test_use_kernel_reaches_products_and_the_loss(native_calls: list[str]) -> None:
    hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    with use_kernel(Kernel.TORCH):
        multiply(torch.ones(2, 3), torch.ones(3, 4))
        linear_cross_entropy(hidden, weight, torch.arange(6), 4).backward()
    assert not native_calls
    linear_cross_entropy(hidden, weight, torch.arange(6), 4).backward()
    assert set(native_calls) == {"compute_product"}


def test_the_environment_is_looked_at_once_while_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESYS_KERNEL", "torch")
    with hold_environment(), hold_environment():
        monkeypatch.setenv("MOESYS_KERNEL", "reference")
        assert read_wish() is Kernel.TORCH
        with use_kernel(Kernel.NATIVE):
            assert read_wish() is Kernel.NATIVE
        assert read_wish() is Kernel.TORCH
    assert read_wish() is Kernel.REFERENCE
    monkeypatch.setenv("MOESYS_KERNEL", "fastest")
    with pytest.raises(KernelError, match="MOESYS_KERNEL is 'fastest'"), hold_environment():
        pass


@pytest.fixture
def warnings_said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    choice._report.cache_clear()
    caplog.set_level(logging.WARNING, logger="moesys")
    yield lambda: [record.getMessage() for record in caplog.records]
    choice._report.cache_clear()


def call_linear(x: Tensor, weight: Tensor) -> None:
    with torch.no_grad():
        for _ in range(3):
            linear(x, weight)


X, WEIGHT = torch.ones(2, 8), torch.ones(6, 8)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (X, torch.ones(8, 6).t(), "it takes contiguous weights; store the weights contiguously"),
        (X.half(), WEIGHT.half(), "x is torch.float16; cast the model to bfloat16 or float32"),
    ],
    ids=["strided", "float16"],
)
def test_a_slower_kernel_is_reported_once(
    x: Tensor, weight: Tensor, message: str, warnings_said: Callable[[], list[str]]
) -> None:
    call_linear(x, weight)
    (said,) = warnings_said()
    assert said.startswith("linear: a slower kernel computes than 'native': ")
    assert message in said


def test_each_reason_and_operator_is_reported(warnings_said: Callable[[], list[str]]) -> None:
    call_linear(X, torch.ones(8, 6).t())
    call_linear(X.half(), WEIGHT.half())
    case = make_case(*MIXED, dtype=torch.float32, rank=2)
    strided = replace(case, adapters=None, gate_up_SFD=case.gate_up_SFD.mT.contiguous().mT)
    with torch.no_grad():
        for each in (case, case, strided, strided):
            compute(each, Kernel.AUTO, summed=True)
        with torch.autocast("cpu"):
            compute(replace(case, adapters=None), Kernel.AUTO, summed=True)
    starts = [said.partition(":")[0] for said in warnings_said()]
    assert starts == ["linear", "linear", "experts", "experts", "experts"]
    adapters, strides, autocast = warnings_said()[2:]
    assert adapters.endswith("it computes no adapters; add them to the weights (scale * b @ a)")
    assert strides.endswith("store the weights contiguously (Tensor.contiguous)")
    assert autocast.endswith(
        "it does not follow autocast; cast the model to bfloat16 instead of using autocast"
    )


def test_what_needs_no_mending_is_silent(warnings_said: Callable[[], list[str]]) -> None:
    call_linear(X, WEIGHT)
    call_linear(X.double(), WEIGHT.double())
    linear(X.clone().requires_grad_(), torch.ones(8, 6).t()).sum().backward()
    with torch.autocast("cpu"):
        linear(X.clone().requires_grad_(), WEIGHT)
    with torch.no_grad():
        linear(X, torch.ones(8, 6).t(), kernel=Kernel.TORCH)
    case = make_case(*MIXED, dtype=torch.float32, rank=2)
    case.x_RD.requires_grad_()
    compute(case, Kernel.AUTO, summed=True)
    assert warnings_said() == []


def test_nothing_is_promised_where_native_cannot_run(
    monkeypatch: pytest.MonkeyPatch, warnings_said: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(native, "find_obstacle", lambda: "no C compiler was found")
    call_linear(X, torch.ones(8, 6).t())
    assert warnings_said() == []


def test_an_operator_that_nothing_can_compute_says_so() -> None:
    with pytest.raises(KernelError, match="no implementation of nothing can compute this call"):
        choose_kernel("nothing", Kernel.AUTO, {Kernel.NATIVE: lambda: Obstacle("it is Tuesday")})


def test_indices_on_another_device_are_no_call_for_native() -> None:
    case = make_case(*MIXED, dtype=torch.float32).with_slots([3, 1, 0, 2], 4)
    for rows, view in (
        (replace(case.rows, row_ids=case.row_ids.to("meta")), case.view),
        (replace(case.rows, offsets=case.offsets.to("meta")), case.view),
        (case.rows, replace(case.view, slot_of_expert=case.view.slot_of_expert.to("meta"))),  # pyrefly: ignore
    ):
        with (
            torch.no_grad(),
            pytest.raises(KernelError, match=r"it runs on CPU tensors; they are on .*'meta'"),
        ):
            compute_experts(rows, view, kernel=Kernel.NATIVE)
