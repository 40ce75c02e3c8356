"""Rows of many views written into one tensor: the bits of one call over all experts, and nothing else is touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_cases import FORMATS, FORWARD, MIXED, ROUTINGS, make_case

from moesys.kernels import Kernel, compute_experts, fill_expert_rows, new_expert_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", [*FORWARD, Kernel.REFERENCE])
@pytest.mark.parametrize("name", ROUTINGS)
def test_views_together_give_the_rows_of_one(name: str, kernel: Kernel, dtype: torch.dtype) -> None:
    case = make_case(*ROUTINGS[name]).to(dtype)
    rows, view = case.rows, case.view
    num_experts = rows.num_experts
    y_AD = new_expert_rows(rows).fill_(float("nan"))
    with torch.no_grad():
        for expert in reversed(range(num_experts)):
            table = torch.full((num_experts,), -1)
            table[expert] = expert
            fill_expert_rows(y_AD, rows, replace(view, slot_of_expert=table), kernel=kernel)
            start = int(rows.offsets[expert])
            assert y_AD[:start].isnan().all()
            assert not y_AD[start:].isnan().any()
        assert torch.equal(y_AD.to(dtype), compute_experts(rows, view, kernel=kernel))


@pytest.mark.parametrize("form", FORMATS)
def test_a_view_of_everything_fills_everything(form: str) -> None:
    case = make_case(*MIXED).with_format(form)
    y_AD = new_expert_rows(case.rows).fill_(float("nan"))
    with torch.no_grad():
        fill_expert_rows(y_AD, case.rows, case.view)
        assert torch.equal(y_AD, compute_experts(case.rows, case.view))
