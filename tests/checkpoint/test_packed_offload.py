"""Law 2 from a packed file: with any number of slots the bits are those of the resident model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packed_models import compute_logits, open_with_slots
from small_checkpoints import GPT_OSS, make_checkpoint

from family_keys import FAMILY_KEYS
from model_folders import write_model
from moesys.checkpoint.hf import load_model as load_folder
from moesys.checkpoint.load import load_model
from moesys.checkpoint.offloaded import open_weights
from moesys.checkpoint.packed_form import PackedForm
from moesys.checkpoint.packing import pack_model
from moesys.errors import IneffectiveOptionError, ModelFormatError, SectionReadError
from moesys.kernels import Int8Product
from moesys.moe import PlainLayout
from moesys.moe.slot_layout import Int8Layout
from moesys.store import SectionReader, Urgency

MOE = ["deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("form", PackedForm)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MOE)
def test_offloaded_equals_resident_in_bits(
    name: str, dtype: torch.dtype, form: PackedForm, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS[name], dtype)
    pack_model(tmp_path / "model", tmp_path / "file", form=form)
    resident = compute_logits(load_model(tmp_path / "file"))
    if form is PackedForm.FLOAT:
        assert torch.equal(resident, compute_logits(load_folder(tmp_path / "model")))
    with open_weights(tmp_path / "file") as weights:
        total = len(weights.experts.sections)
    for num_slots in (1, 2, 5, total):
        with open_with_slots(tmp_path / "file", num_slots) as (model, execution, cache):
            assert torch.equal(compute_logits(model, execution), resident), num_slots
            assert num_slots < total or cache.stats.num_loads == total


def test_activations_are_rounded_when_asked_for_and_only_then(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["deepseek_v3"], torch.bfloat16)
    pack_model(tmp_path / "model", tmp_path / "file", form=PackedForm.INT8)
    found = {}
    for product in Int8Product:
        resident = compute_logits(load_model(tmp_path / "file", product=product))
        with open_with_slots(tmp_path / "file", 3, product) as (model, execution, _):
            found[product] = compute_logits(model, execution)
        assert torch.equal(found[product], resident)
    with open_with_slots(tmp_path / "file", 3) as (model, execution, _):
        assert torch.equal(compute_logits(model, execution), found[Int8Product.W8])
    assert not torch.equal(found[Int8Product.W8], found[Int8Product.W8A8])


def test_a_layout_that_no_folder_offers_is_packed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    make_checkpoint(tmp_path / "model", GPT_OSS)
    with pytest.raises(ModelFormatError, match="in another order"), open_weights(tmp_path / "model"):
        pass
    pack_model(tmp_path / "model", tmp_path / "file")
    with open_with_slots(tmp_path / "file", 2) as (model, execution, _):
        found = compute_logits(model, execution)
    assert torch.equal(found, compute_logits(load_folder(tmp_path / "model")))


@pytest.mark.parametrize("form", PackedForm)
def test_what_is_told_before_anything_is_read(form: PackedForm, tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["deepseek_v3"], torch.bfloat16)
    pack_model(tmp_path / "model", tmp_path / "file", form=form)
    with open_weights(tmp_path / "file") as weights:
        assert weights.dtype is torch.bfloat16
        assert weights.config.num_layers == 2
        assert weights.experts.layouts.keys() == {1}
        layout = weights.experts.layouts[1]
        assert isinstance(layout, Int8Layout if form is PackedForm.INT8 else PlainLayout)
        assert (layout.hidden_size, layout.inner_size) == (32, 24)
        sections = weights.experts.sections
        assert all(section.checksums is not None for section in sections.values())
        assert all(section.extents[0].offset % 4096 == 0 for section in sections.values())
        assert {e.offset % 64 for section in sections.values() for e in section.extents} == {0}
        expected = weights.resident_bytes
        model = weights.load_resident()
    loaded = [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    assert sum(tensor.nbytes for tensor in loaded) == expected
    assert [t for t in model.parameters() if t.is_meta]


def test_two_engines_share_a_file(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    pack_model(tmp_path / "model", tmp_path / "file", form=PackedForm.INT8)
    resident = compute_logits(load_model(tmp_path / "file"))
    with (
        open_with_slots(tmp_path / "file", 2) as (one, one_execution, _),
        open_with_slots(tmp_path / "file", 3) as (other, other_execution, _),
    ):
        for _ in range(2):
            assert torch.equal(compute_logits(one, one_execution), resident)
            assert torch.equal(compute_logits(other, other_execution), resident)


def test_a_model_without_experts_stays_in_memory(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["llama"])
    pack_model(tmp_path / "model", tmp_path / "file", form=PackedForm.INT8)
    for path in (tmp_path / "model", tmp_path / "file"):
        with (
            pytest.raises(
                ModelFormatError,
                match=r"has no experts that could stay on the disk: .* without --host-memory, and has nothing",
            ),
            open_weights(path),
        ):
            pass


def test_a_product_needs_int8_weights(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    pack_model(tmp_path / "model", tmp_path / "file")
    for path in (tmp_path / "model", tmp_path / "file"):
        with (
            pytest.raises(IneffectiveOptionError, match="product w8 has no effect"),
            open_weights(path, Int8Product.W8),
        ):
            pass


def test_a_changed_expert_is_never_computed_with(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    path = tmp_path / "file"
    pack_model(tmp_path / "model", path, form=PackedForm.INT8)
    with open_weights(path) as weights:
        extents = weights.experts.sections[1, 3].extents
    for extent in extents:
        contents = bytearray(path.read_bytes())
        contents[extent.offset + extent.num_bytes // 2] ^= 1
        (tmp_path / "changed").write_bytes(contents)
        with open_weights(tmp_path / "changed") as weights, SectionReader() as reader:
            section = weights.experts.sections[1, 3]
            read = reader.submit(
                section, [memoryview(bytearray(e.num_bytes)) for e in extents], Urgency.DEMAND
            )
            reader.wait_any([read])
            assert read.error is not None
        with pytest.raises(SectionReadError, match=r"changed: section layer 1, expert 3 .*checksum"):
            load_model(tmp_path / "changed")
