"""Operators inside ``torch.compile``: one node per call, and the bits of an eager call."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from expert_cases import FORMATS, FORMS, MIXED, Case, make_case
from torch import Tensor, nn
from torch.autograd import forward_ad

from moesys.errors import KernelError, ShapeError
from moesys.kernels import (
    Int8Product,
    Kernel,
    ModuleView,
    Rows,
    compute_experts,
    compute_experts_summed,
    linear,
    pack_int8,
    use_kernel,
)
from moesys.kernels.experts.operator import flatten_call
from moesys.moe import Execution, LocalDispatcher, MoEConfig, MoELayer, ResidentSource

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_whole(function: Callable[..., Tensor], backend: str = "aot_eager") -> Callable[..., Tensor]:
    return torch.compile(function, backend=backend, fullgraph=True)


def to_weight(weight: Tensor, weight_format: str) -> object:
    if weight_format in list(Int8Product):
        return pack_int8(weight, Int8Product(weight_format))
    return weight.to(getattr(torch, weight_format))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_linear_in_one_graph_has_the_bits_of_eager(weight_format: str) -> None:
    x, bias = torch.randn(2, 3, 70), torch.randn(40)
    weight = to_weight(torch.randn(40, 70), weight_format)

    def compute(x: Tensor) -> Tensor:
        return linear(x.relu(), weight, bias) * 2  # pyrefly: ignore

    with torch.no_grad():
        compiled = compile_whole(compute)
        for some in (x, x[:, :1], x[:, :2]):
            assert torch.equal(compiled(some), compute(some))


def compute_both(case: Case, kernel: Kernel = Kernel.AUTO) -> Tensor:
    rows_AD = compute_experts(case.rows, case.view, case.adapters, kernel)
    return torch.cat(
        [
            rows_AD,
            compute_experts_summed(
                case.rows, case.view, case.weights_A, case.token_sum, case.adapters, kernel
            ),
        ]
    )


CASES = {
    **{weight_format: {"weight_format": weight_format} for weight_format in FORMATS},
    **{form: {"form": FORMS[form], "bias": True} for form in FORMS},
    "adapters": {"rank": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_experts_in_one_graph_have_the_bits_of_eager(name: str) -> None:
    options = dict(CASES[name])
    weight_format = str(options.pop("weight_format", "float32"))
    case = make_case(*MIXED, hidden=40, inner=33, **options).with_format(weight_format)  # pyrefly: ignore
    with torch.no_grad():
        assert torch.equal(compile_whole(compute_both)(case), compute_both(case))


def test_experts_of_a_partial_view_in_one_graph() -> None:
    case = make_case(*MIXED, dtype=torch.float32).with_slots([3, -1, 0, -1], 5)

    def compute(rows: Rows) -> Tensor:
        return compute_experts(rows, case.view)

    with torch.no_grad():
        assert torch.equal(compile_whole(compute)(case.rows), compute(case.rows))


def test_a_graph_follows_the_kernel_that_is_asked_for() -> None:
    case = make_case(*MIXED, hidden=40, inner=33, dtype=torch.float32)
    with torch.no_grad():
        for kernel in (Kernel.REFERENCE, Kernel.TORCH, Kernel.NATIVE):
            assert torch.equal(compile_whole(compute_both)(case, kernel), compute_both(case, kernel))
        with pytest.raises(KernelError, match="'native' cannot compute linear: it takes float32 or bfloat16"):
            compile_whole(linear)(torch.ones(1, 2).double(), torch.ones(3, 2).double(), None, Kernel.NATIVE)


def test_a_graph_checks_its_calls() -> None:
    case = make_case(*MIXED, dtype=torch.float32)

    def compute(rows: Rows) -> Tensor:
        return compute_experts(rows, case.view)

    with torch.no_grad(), pytest.raises(ShapeError, match="must hold all 2 experts, it has 4 slots"):
        compile_whole(compute)(Rows(case.x_RD, case.row_ids, case.offsets[:3]))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_operators_pass_torchs_checks(weight_format: str) -> None:
    case = make_case(*MIXED, hidden=40, inner=33, bias=True).with_format(weight_format)
    flat = flatten_call(case.rows, case.view, None, Kernel.AUTO)
    torch.library.opcheck(torch.ops.moesys.experts.default, flat)
    sums = (case.weights_A, case.token_sum.positions, case.token_sum.offsets, *flat)
    torch.library.opcheck(torch.ops.moesys.experts_summed.default, sums)
    values, scales, columns, product = flat[3], flat[4], flat[5], flat[9]
    assert isinstance(values, Tensor)
    matrix = (values[0], scales[0] if isinstance(scales, Tensor) else None, columns, product)
    torch.library.opcheck(torch.ops.moesys.linear.default, (case.x_RD, *matrix, None, "auto"))


def test_training_compiles_with_the_gradients_of_eager() -> None:
    x, weight, bias = torch.randn(5, 70), torch.randn(40, 70), torch.randn(40)
    gradients = []
    for function in (linear, compile_whole(linear)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        function(*leaves).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*gradients, strict=True):
        assert eager is not None
        assert compiled is not None
        assert (eager - compiled).abs().max() <= 1e-5 * eager.abs().max()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_compiled_training_follows_the_wish_for_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(5, 70, requires_grad=True), torch.randn(40, 70)
    compiled = torch.compile(linear, backend="aot_eager")
    of_torch, specified = (linear(x, weight, kernel=kernel) for kernel in (Kernel.TORCH, Kernel.REFERENCE))
    assert not torch.equal(of_torch, specified)
    for wish, expected in (
        (Kernel.AUTO, of_torch),
        (Kernel.REFERENCE, specified),
        (Kernel.TORCH, of_torch),
        (Kernel.AUTO, of_torch),
    ):
        with use_kernel(wish):
            assert torch.equal(compiled(x, weight), expected), wish
    with use_kernel(Kernel.NATIVE), pytest.raises(KernelError, match="it has no backward pass"):
        compiled(x, weight)
    torch.compiler.reset()
    monkeypatch.setenv("MOESYS_KERNEL", "reference")
    assert torch.equal(torch.compile(linear, backend="aot_eager")(x, weight), specified)


def test_a_wish_for_torch_leaves_training_in_one_graph() -> None:
    x, weight = torch.randn(5, 70, requires_grad=True), torch.randn(40, 70)
    compiled = compile_whole(linear)
    with use_kernel(Kernel.TORCH):
        assert torch.equal(compiled(x, weight), linear(x, weight))
    assert torch.equal(compiled(x, weight, None, Kernel.TORCH), linear(x, weight, kernel=Kernel.TORCH))


def make_functions() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Operators as functions of their first argument, and one for it."""
    weight = torch.randn(40, 70)
    case = make_case(*MIXED, dtype=torch.float32, bias=True)

    def compute_rows(x: Tensor) -> Tensor:
        return compute_experts(Rows(x, case.row_ids, case.offsets), case.view)

    def compute_sums(x: Tensor) -> Tensor:
        rows = Rows(x, case.row_ids, case.offsets)
        return compute_experts_summed(rows, case.view, case.weights_A, case.token_sum)

    return {
        "linear": (lambda x: linear(x, weight), torch.randn(5, 70)),
        "experts": (compute_rows, case.x_RD),
        "summed": (compute_sums, case.x_RD),
    }


def push_forward(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.jvp(function, (x,), (x.cos(),))[1]


def push_dual(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor | None]:
    def push(x: Tensor) -> Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent

    return push


def pull_back(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.func.grad(lambda x: function(x).square().sum())


def batch(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.vmap(function)(torch.stack([x, x.cos()]))


Transform = Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor | None]]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("transform", [push_forward, push_dual, batch])
@pytest.mark.parametrize("name", ["linear", "summed"])
def test_transforms_reach_through_a_graph_from_inside_and_outside(name: str, transform: Transform) -> None:
    function, x = make_functions()[name]
    with torch.no_grad():
        expected = transform(function)(x)
        inside = torch.compile(transform(function), backend="aot_eager")(x)
        compiled = torch.compile(function, backend="aot_eager")
        compiled(x)
        outside = transform(compiled)(x)
    for found in (inside, outside):
        assert found is not None
        assert expected is not None
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_gradient_of_torch_func_is_part_of_the_graph() -> None:
    function, x = make_functions()["linear"]
    assert torch.allclose(compile_whole(pull_back(function))(x), pull_back(function)(x), rtol=1e-5)


def make_raw_functions() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """The nodes themselves, which nothing but a graph should hold."""
    case = make_case(*MIXED, dtype=torch.float32, rank=2)
    flat = flatten_call(case.rows, case.view, case.adapters, Kernel.AUTO)[1:]
    sums = (case.weights_A, case.token_sum.positions, case.token_sum.offsets)
    matrix = (torch.randn(40, case.x_RD.shape[1]), None, case.x_RD.shape[1], "", None, "auto")
    operators = torch.ops.moesys
    return {
        "linear": (lambda x: operators.linear.default(x, *matrix), case.x_RD),
        "experts": (lambda x: operators.experts.default(x, *flat), case.x_RD),
        "summed": (lambda x: operators.experts_summed.default(*sums, x, *flat), case.x_RD),
        "low rank": (
            lambda a: operators.experts.default(case.x_RD, *flat[:-3], [a, *flat[-3][1:]], *flat[-2:]),  # pyrefly: ignore
            flat[-3][0],  # pyrefly: ignore
        ),
    }


@pytest.mark.parametrize("transform", [push_forward, push_dual, pull_back])
@pytest.mark.parametrize("name", ["linear", "experts", "summed", "low rank"])
def test_a_node_refuses_the_derivatives_that_it_would_lose(name: str, transform: Transform) -> None:
    function, x = make_raw_functions()[name]
    with pytest.raises(KernelError, match="has no derivatives"):
        transform(function)(x)
    with pytest.raises(RuntimeError, match="has no derivatives"):
        torch.compile(transform(function), backend="aot_eager")(x)
    with pytest.raises(KernelError, match="has no derivatives"):
        function(x.clone().requires_grad_())


def test_a_node_can_be_batched_over() -> None:
    function, x = make_raw_functions()["linear"]
    assert torch.equal(batch(function)(x), torch.stack([function(x), function(x.cos())]))


def make_layer(*, checks_logits: bool) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    layer = MoELayer(32, MoEConfig(num_experts=4, top_k=2, intermediate_size=48))
    source = ResidentSource({0: layer.experts})
    execution = Execution(LocalDispatcher(), source, checks_logits=checks_logits)

    def compute(x: Tensor) -> Tensor:
        return layer(x, execution)[0]

    return compute


def test_a_dropless_resident_layer_is_one_graph() -> None:
    """Without the check of its logits, which waits for their values."""
    compute, x = make_layer(checks_logits=False), torch.randn(7, 32)
    with torch.no_grad():
        compiled = compile_whole(compute)
        for count in (7, 3, 1):
            assert torch.equal(compiled(x[:count]), compute(x[:count]))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_where_a_graph_breaks_it_is_not_in_a_kernel() -> None:
    compute, x = make_layer(checks_logits=True), torch.randn(7, 32)
    with torch.no_grad():
        explained = torch._dynamo.explain(compute)(x)
    assert explained.break_reasons
    innermost = [reason.user_stack[-1].filename for reason in explained.break_reasons]
    assert not [name for name in innermost if "kernels" in name]


def test_modules_break_the_graph_and_compute() -> None:
    """They cannot be arguments of a node, and how many rows each gets is a value."""
    torch.manual_seed(0)
    experts = [nn.Linear(6, 6) for _ in range(3)]
    case = make_case([[0, 1], [2], [1]], 3, hidden=6, dtype=torch.float32)

    def compute(rows: Rows) -> Tensor:
        return compute_experts(rows, ModuleView(experts))

    with torch.no_grad():
        assert torch.equal(torch.compile(compute, backend="aot_eager")(case.rows), compute(case.rows))


def test_eager_calls_do_not_load_the_compiler() -> None:
    code = (
        "import sys, torch; from moesys.kernels import linear\n"
        "linear(torch.ones(2, 4), torch.ones(3, 4)); print('torch._dynamo' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout == "False\n", ended.stderr


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on a CPU needs a C++ compiler")
def test_inductor_takes_the_layer_in_one_graph() -> None:
    compute, x = make_layer(checks_logits=False), torch.randn(7, 32)
    with torch.no_grad():
        found, expected = compile_whole(compute, "inductor")(x), compute(x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
