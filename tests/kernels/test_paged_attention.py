"""Attention over pages against its float64 definition, in values; and in bits, whatever lies or runs beside a query."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from moesys.errors import KernelError, ShapeError
from moesys.kernels import Kernel, native, use_kernel
from moesys.kernels.attention import PageTable, attend_pages, reads_in_place
from moesys.kernels.native.cpu_level import LEVELS, find_cpu_level

PAGE_TOKENS, NUM_PAGES = 64, 40
STOPS = (1, 63, 64, 65, 256, 257, 300, 771)
KERNELS = [Kernel.TORCH] + [Kernel.NATIVE] * (native.find_obstacle() is None)
NARROWER = [
    level
    for level in LEVELS
    if level.features < find_cpu_level().features and level.name in ("avx2", "baseline")
]
"""Levels with other vectors than this CPU's; among those with equal ones attention is the same code."""
needs_native = pytest.mark.skipif(native.find_obstacle() is not None, reason="no native kernels here")


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int
    values_in_keys: bool = False


GROUPED = Heads(6, 2, 32, 32)
HEADS = (
    GROUPED,
    Heads(4, 4, 128, 128),
    Heads(7, 1, 37, 19, True),
    Heads(14, 2, 24, 41),
    Heads(40, 1, 600, 24, True),
    Heads(1, 1, 1, 1),
)


@dataclass(frozen=True)
class Case:
    """A call; all rows that no query sees are NaN."""

    q_THD: Tensor
    keys: Tensor
    values: Tensor | None
    table: PageTable
    value_size: int
    sliding_window: int | None = None
    sinks_H: Tensor | None = None

    def compute(self, kernel: Kernel = Kernel.AUTO) -> Tensor:
        return attend_pages(
            self.q_THD,
            self.keys,
            self.values,
            self.table,
            scale=self.key_scale,
            value_size=self.value_size,
            sliding_window=self.sliding_window,
            sinks_H=self.sinks_H,
            kernel=kernel,
        )

    @property
    def key_scale(self) -> float:
        return self.q_THD.shape[2] ** -0.5

    def widen(self) -> Case:
        return replace(
            self,
            q_THD=self.q_THD.double(),
            keys=self.keys.double(),
            values=None if self.values is None else self.values.double(),
        )

    def pick(self, queries: Sequence[int]) -> Case:
        """The same call for some of its queries."""
        table = replace(
            self.table, starts_T=self.table.starts_T[queries], stops_T=self.table.stops_T[queries]
        )
        return replace(self, q_THD=self.q_THD[queries], table=table)


def make_case(
    heads: Heads,
    dtype: torch.dtype,
    *,
    stops: Sequence[int] = STOPS,
    sliding_window: int | None = None,
    has_sinks: bool = False,
    places: int = 0,
) -> Case:
    """places: a seed of where pages lie; nothing else depends on it."""
    numbers = torch.Generator().manual_seed(1)
    order = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(places)).tolist()
    pages = []
    for stop in stops:
        count = -(-stop // PAGE_TOKENS)
        pages.append(order[:count])
        del order[:count]
    table = PageTable.from_lists(PAGE_TOKENS, pages, stops)
    sizes = (heads.key_size,) if heads.values_in_keys else (heads.key_size, heads.value_size)
    cached = []
    for size in sizes:
        rows = torch.full((NUM_PAGES * PAGE_TOKENS, heads.num_kv_heads, size), torch.nan)
        for seen in table.list_rows(sliding_window):
            rows[seen] = torch.randn(len(seen), heads.num_kv_heads, size, generator=numbers)
        cached.append(rows.to(dtype))
    return Case(
        torch.randn(len(stops), heads.num_heads, heads.key_size, generator=numbers).to(dtype),
        cached[0],
        None if heads.values_in_keys else cached[1],
        table,
        heads.value_size,
        sliding_window,
        torch.linspace(-1, 3, heads.num_heads) if has_sinks else None,
    )


def compute_definition(case: Case) -> Tensor:
    """Written out once more, and not as the kernels' reference is."""
    outputs = []
    num_kv_heads = case.keys.shape[1]
    values = case.keys[..., : case.value_size] if case.values is None else case.values
    for q_HD, rows in zip(case.q_THD, case.table.list_rows(case.sliding_window), strict=True):
        q_KGD = q_HD.unflatten(0, (num_kv_heads, -1))
        weights_SH = (torch.einsum("kgd,skd->skg", q_KGD, case.keys[rows]) * case.key_scale).exp().flatten(1)
        total_H = weights_SH.sum(0) + (0 if case.sinks_H is None else case.sinks_H.double().exp())
        weights_SKG = (weights_SH / total_H).unflatten(1, (num_kv_heads, -1))
        outputs.append(torch.einsum("skg,skd->kgd", weights_SKG, values[rows]).flatten(0, 1))
    return torch.stack(outputs)


@pytest.mark.parametrize("sliding_window", [None, 1, 70, 300])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_reference_is_the_definition(sliding_window: int | None, has_sinks: bool) -> None:
    for heads in (GROUPED, Heads(3, 1, 5, 2, True)):
        case = make_case(
            heads, torch.float64, stops=(1, 65, 130), sliding_window=sliding_window, has_sinks=has_sinks
        )
        torch.testing.assert_close(case.compute(Kernel.REFERENCE), compute_definition(case))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sliding_window", [None, 1, 70, 300])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_it_is_the_definition(
    heads: Heads, sliding_window: int | None, dtype: torch.dtype, kernel: Kernel
) -> None:
    for has_sinks in (False, True):
        case = make_case(heads, dtype, sliding_window=sliding_window, has_sinks=has_sinks)
        expected = compute_definition(case.widen())
        found = case.compute(kernel)
        assert found.dtype == dtype
        # Sums of float32 in both dtypes; half a unit in the last place of bfloat16 for the result.
        tolerance = 1e-5 if dtype is torch.float32 else 2**-8
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_queries_and_memory_may_differ_in_dtype(kernel: Kernel) -> None:
    case = make_case(GROUPED, torch.bfloat16)
    wide = replace(case, q_THD=case.q_THD.float())
    found = wide.compute(kernel)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), compute_definition(case.widen()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_scores_do_not_overflow(kernel: Kernel) -> None:
    case = make_case(GROUPED, torch.float32)
    case = replace(case, q_THD=case.q_THD * 100, keys=case.keys + 10)
    torch.testing.assert_close(
        case.compute(kernel).double(), case.widen().compute(Kernel.REFERENCE), rtol=1e-3, atol=1e-3
    )


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_neither_places_nor_neighbours_nor_threads_change_a_bit(heads: Heads, dtype: torch.dtype) -> None:
    for sliding_window in (None, 300):
        cases = [
            make_case(heads, dtype, sliding_window=sliding_window, has_sinks=True, places=seed)
            for seed in (0, 1)
        ]
        found, elsewhere = (case.compute(Kernel.NATIVE) for case in cases)
        assert torch.equal(found, elsewhere)
        for query in range(len(STOPS)):
            alone = cases[0].pick([query]).compute(Kernel.NATIVE)
            assert torch.equal(alone[0], found[query])
        many = [*range(len(STOPS)), *reversed(range(len(STOPS))), 3]
        assert torch.equal(cases[0].pick(many).compute(Kernel.NATIVE), found[many])
        threads = torch.get_num_threads()
        try:
            for num_threads in (1, 2, 5):
                torch.set_num_threads(num_threads)
                assert torch.equal(cases[0].compute(Kernel.NATIVE), found)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("kernel", KERNELS)
def test_consecutive_tokens_of_a_sequence_each_see_up_to_themselves(kernel: Kernel) -> None:
    last = make_case(GROUPED, torch.float32, stops=(270,))
    q_THD = torch.randn(8, *last.q_THD.shape[1:], generator=torch.Generator().manual_seed(2))
    stops_T = torch.arange(263, 271)
    case = replace(
        last, q_THD=q_THD, table=replace(last.table, starts_T=torch.zeros_like(stops_T), stops_T=stops_T)
    )
    torch.testing.assert_close(
        case.compute(kernel).double(), compute_definition(case.widen()), rtol=1e-5, atol=1e-5
    )


@needs_native
def test_pages_out_of_sight_may_have_been_given_back() -> None:
    case = make_case(GROUPED, torch.float32, stops=(300,), sliding_window=70)
    page_ids = case.table.page_ids.clone()
    page_ids[:3] = -1
    given_back = replace(case, table=replace(case.table, page_ids=page_ids))
    assert torch.equal(given_back.compute(Kernel.NATIVE), case.compute(Kernel.NATIVE))


@needs_native
@pytest.mark.parametrize(
    ("page", "stop"), [(-1, 65), (NUM_PAGES, 65), (2**60, 65), (1, 0), (1, 129), (1, -3)]
)
def test_pages_and_stops_out_of_range_are_refused(page: int, stop: int) -> None:
    case = make_case(GROUPED, torch.float32, stops=(65,))
    table = PageTable.from_lists(PAGE_TOKENS, [[0, page]], [stop])
    with pytest.raises(ShapeError, match="every query needs 1 or more tokens, on pages of 64 below row 2560"):
        replace(case, table=table).compute(Kernel.NATIVE)


@needs_native
def test_a_page_may_end_with_the_memory_inside_it() -> None:
    case = make_case(GROUPED, torch.float32, stops=(65,))
    end = NUM_PAGES * PAGE_TOKENS - PAGE_TOKENS + 1
    short = replace(case, keys=case.keys[:end], values=case.values[:end])  # pyrefly: ignore
    short = replace(short, table=PageTable.from_lists(PAGE_TOKENS, [[0, NUM_PAGES - 1]], [65]))
    short.compute(Kernel.NATIVE)
    with pytest.raises(ShapeError, match="below row"):
        replace(short, table=PageTable.from_lists(PAGE_TOKENS, [[0, NUM_PAGES - 1]], [66])).compute(
            Kernel.NATIVE
        )


@needs_native
def test_who_reads_in_place() -> None:
    case = make_case(GROUPED, torch.float32)

    def reads(case: Case) -> bool:
        return reads_in_place(case.q_THD, case.keys, case.values, case.table, case.sinks_H)

    assert reads(case)
    assert not reads(case.widen())
    with use_kernel(Kernel.TORCH):
        assert not reads(case)
    watched = replace(case, q_THD=case.q_THD.clone().requires_grad_())
    assert not reads(watched)
    with torch.no_grad():
        assert reads(watched)
    with pytest.raises(KernelError, match="no backward pass"):
        watched.compute(Kernel.NATIVE)
    assert watched.compute().requires_grad


def test_what_does_not_fit_is_refused() -> None:
    case = make_case(GROUPED, torch.float32)
    wrong = {
        "of one size": replace(case, q_THD=case.q_THD[..., :5]),
        "must divide heads": replace(case, q_THD=case.q_THD[:, :5]),
        "the table has 8 queries, q has 2": replace(case, q_THD=case.q_THD[:2]),
        "must have the rows, heads and dtype": replace(case, values=case.keys.double()),
        "value_size .3. must be that": replace(case, value_size=3),
        "value_size .33. must be 1 to": replace(case, values=None, value_size=33),
        "sliding_window .0.": replace(case, sliding_window=0),
        "sinks must be": replace(case, sinks_H=torch.ones(2)),
    }
    for message, wrong_case in wrong.items():
        with pytest.raises(ShapeError, match=message):
            wrong_case.compute()
    with pytest.raises(ShapeError, match="contiguous int64"):
        replace(case.table, page_ids=case.table.page_ids.int())


CHECK = """
import torch
from test_paged_attention import HEADS, Kernel, compute_definition, make_case
for heads in HEADS:
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(heads, dtype, sliding_window=300, has_sinks=True)
        found, expected = case.compute(Kernel.NATIVE), compute_definition(case.widen())
        tolerance = 1e-5 if dtype is torch.float32 else 2**-8
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=1e-5)
print("agreed")
"""


@needs_native
@pytest.mark.parametrize("level", NARROWER, ids=lambda level: level.name)
def test_narrower_vectors_give_the_definition(level: object) -> None:
    environment = {"OMP_NUM_THREADS": "1", "MOESYS_CPU_LEVEL": level.name}  # pyrefly: ignore
    ended = subprocess.run(
        [sys.executable, "-c", CHECK],
        env={**os.environ, **environment},
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "agreed\n", ended.stderr
