"""Where the parts of an expert lie in its extent, and which tensors a packed file of a model has."""

from __future__ import annotations

import pytest
import torch

from family_keys import FAMILY_KEYS
from model_folders import find_family
from moesys.checkpoint.packed_form import PackedForm
from moesys.checkpoint.packed_outline import PackedTensor, PartPlace, make_outline
from moesys.moe import PlainLayout, SlotLayout
from moesys.moe.slot_layout import Int8Layout


@pytest.mark.parametrize(
    "layout", [PlainLayout(7, 5, torch.bfloat16, has_bias=True), Int8Layout(7, 5, has_bias=True)]
)
def test_parts_begin_at_cache_lines_and_experts_fill_pages(layout: SlotLayout) -> None:
    extent = PackedTensor.expert(layout)
    end = 0
    for place, shape in zip(extent.parts, layout.part_shapes, strict=True):
        assert place.offset % 64 == 0
        assert end <= place.offset < end + 64
        assert place.num_bytes == shape.num_bytes
        end = place.offset + place.num_bytes
    assert extent.record.dtype == "U8"
    assert end <= extent.record.size_bytes < end + 4096
    assert extent.record.size_bytes % 4096 == 0


def test_an_extent_by_hand() -> None:
    extent = PackedTensor.expert(PlainLayout(40, 30, torch.float32))
    assert extent.parts == (PartPlace(0, 9600), PartPlace(9600, 4800))
    assert extent.record.shape == (16384,)
    extent = PackedTensor.expert(PlainLayout(40, 31, torch.bfloat16))
    assert extent.parts == (PartPlace(0, 4960), PartPlace(4992, 2480))
    assert extent.record.shape == (8192,)


@pytest.mark.parametrize("form", PackedForm)
def test_experts_come_first_and_wide_dtypes_before_narrow_ones(form: PackedForm) -> None:
    config = find_family(FAMILY_KEYS["deepseek_v3"]).read_config(FAMILY_KEYS["deepseek_v3"])
    outline = make_outline(config, torch.bfloat16, form)
    names = [name for name, _ in outline.list_tensors()]
    assert names[:8] == [f"experts/1/{expert_id}" for expert_id in range(8)]
    assert not any(name.startswith("experts/") for name in names[8:])
    widths = [tensor.record.torch_dtype.itemsize for _, tensor in outline.list_tensors()][8:]
    assert widths == sorted(widths, reverse=True)
    assert set(widths) == ({4, 2} if form is PackedForm.FLOAT else {4, 2, 1})
    assert not any("experts" in name for name in outline.core if "shared" not in name)
