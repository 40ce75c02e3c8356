"""Law 2: a model whose experts come from the disk gives the bits of the resident one, for any number of slots."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint.small_checkpoints import (
    DEEPSEEK,
    GPT_OSS,
    make_checkpoint,
    quantise_fp8,
    write_quantised,
)
from made_profiles import make_profile
from moesys.checkpoint import (
    AS_PUBLISHED,
    convert_model,
    load_model,
    open_weights,
    parse_dtype,
    save_model,
)
from moesys.errors import GenerationError, ModelFormatError, SectionReadError
from moesys.inference import Engine, SequenceStep
from moesys.inference.offload import load_offloaded
from moesys.inference.offload_plan import OffloadPlan, OffloadRequest, plan_offload
from moesys.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    DenseConfig,
    LatentAttentionConfig,
    QKNorm,
    RopeConfig,
    initialize_weights,
)
from moesys.moe import Execution, MoEConfig, Normalization, Score
from moesys.planning import Goal
from moesys.planning.plan import BATCH_SIZES
from moesys.store import SectionCache

NUM_LAYERS, NUM_EXPERTS, NUM_POSITIONS = 3, 8, 40
GQA = AttentionConfig(4, 2, 8, RopeConfig(8))
LATENT = LatentAttentionConfig(4, 12, 16, 8, 8, RopeConfig(4, is_interleaved=True))
MOE = MoEConfig(NUM_EXPERTS, 2, 24)
MODELS = {
    "qwen3_moe": (replace(GQA, qk_norm=QKNorm.PER_HEAD), MOE),
    "mixtral": (GQA, MOE),
    "granitemoe": (replace(GQA, softmax_scale=0.3), replace(MOE, weighting=Normalization.BEFORE)),
    "deepseek_v3": (
        LATENT,
        replace(MOE, score=Score.SIGMOID, selection_bias=True, shared_intermediate_size=24, weight_scale=2.5),
    ),
}


def write_model(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    mixer, moe = MODELS[name]
    feed_forwards = (DenseConfig(20) if name == "deepseek_v3" else moe, moe, moe)
    config = DecoderConfig(
        61, 32, (mixer,) * NUM_LAYERS, feed_forwards, tie_embeddings=False, max_positions=NUM_POSITIONS
    )
    model = Decoder(config)
    initialize_weights(model, seed=1, std=0.3)
    exported = save_model(model, folder, dtype, {})
    assert exported.family.model_type == name
    return folder


def generate_logits(model: Decoder, execution: Execution | None = None) -> Tensor:
    """A prompt in one piece, then token by token."""
    engine, draw = Engine(model, execution), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (NUM_POSITIONS,), generator=draw).tolist()
    sequence = engine.open_sequence(NUM_POSITIONS)
    logits = engine.step([SequenceStep(sequence, 0, ids[:24])])
    for position in range(24, NUM_POSITIONS):
        logits += engine.step([SequenceStep(sequence, position, ids[position : position + 1])])
    return torch.cat(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_offloaded_equals_resident_in_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_model(tmp_path, name, dtype)
    resident = generate_logits(load_model(folder))
    total = NUM_EXPERTS * (2 if name == "deepseek_v3" else 3)
    for num_slots in (1, 2, 3, 7, total):
        with load_offloaded(folder, OffloadRequest("1GiB", NUM_POSITIONS, num_slots=num_slots)) as offloaded:
            found = generate_logits(offloaded.model, offloaded.execution)
            stats = offloaded.stats
        assert torch.equal(found, resident), num_slots
        assert stats.num_loads > 2 * total or num_slots == total
        assert num_slots < total or stats.num_loads == total


def test_a_share_of_the_weights_decides_how_many_experts_stay(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    total = sum(p.numel() * 4 for p in load_model(folder).parameters())
    slot_bytes = 3 * 24 * 32 * 4
    core_bytes = total - 24 * slot_bytes
    for num_slots in (2, 11, 23):
        share = 100 * (core_bytes + (num_slots + 0.5) * slot_bytes) / total
        with load_offloaded(folder, OffloadRequest(f"{share:.6f}%", NUM_POSITIONS)) as offloaded:
            assert next(iter(offloaded.caches.values())).pool.num_slots == num_slots
            assert f"{num_slots} of 24 experts" in offloaded.describe_plan()
            in_memory = [p for p in offloaded.model.parameters() if not p.is_meta]
            assert sum(p.numel() * 4 for p in in_memory) == offloaded.plan.tier.core_bytes == core_bytes
    with load_offloaded(folder, OffloadRequest("100%", NUM_POSITIONS)) as offloaded:
        assert next(iter(offloaded.caches.values())).pool.num_slots == 24
        generate_logits(offloaded.model, offloaded.execution)
        assert "read from the disk in 24 experts, 0 of them never used" in offloaded.describe_traffic()


@pytest.mark.parametrize("host_memory", ["1%", "200MiB"])
def test_an_impossible_budget_is_refused_with_the_sum_before_anything_is_loaded(
    host_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path, "mixtral")

    def fail(*arguments: object) -> None:
        raise AssertionError("memory was spent")

    monkeypatch.setattr("moesys.checkpoint.hf.allocate_weight", fail)
    monkeypatch.setattr("moesys.store.slots.allocate_weight", fail)
    with (
        pytest.raises(
            GenerationError, match=r"--host-memory .* is less than resident weights .* \+ 2 experts .* = "
        ),
        load_offloaded(folder, OffloadRequest(host_memory, NUM_POSITIONS)),
    ):
        pass


def test_a_size_holds_what_a_pass_over_the_prompt_needs(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    with load_offloaded(folder, OffloadRequest("300MiB", NUM_POSITIONS)) as offloaded:
        assert offloaded.plan.tier.step_bytes > 2**14
        needed = offloaded.plan.tier.used_bytes - 22 * 3 * 24 * 32 * 4
    with load_offloaded(folder, OffloadRequest(f"{needed + 2**14}B", NUM_POSITIONS)) as offloaded:
        assert 2 <= offloaded.plan.tier.num_experts < 24
        assert offloaded.plan.tier.used_bytes <= needed + 2**14
    with (
        pytest.raises(GenerationError, match=r"\+ a pass of 40 tokens \d.* KiB \+ a reserve"),
        load_offloaded(folder, OffloadRequest(f"{needed - 2**14}B", NUM_POSITIONS)),
    ):
        pass


def test_a_number_of_slots_is_part_of_the_plan(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    with load_offloaded(folder, OffloadRequest("1GiB", NUM_POSITIONS, num_slots=5)) as offloaded:
        assert (offloaded.plan.tier.num_experts, next(iter(offloaded.caches.values())).pool.num_slots) == (
            5,
            5,
        )
        assert offloaded.plan.tier.expert_bytes == next(iter(offloaded.caches.values())).pool.num_bytes
        assert "5 of 24 experts" in offloaded.describe_plan()
    for num_slots in (0, -1, 25):
        with (
            pytest.raises(GenerationError, match=rf"num_slots \({num_slots}\) must be 1 to 24"),
            load_offloaded(folder, OffloadRequest("1GiB", NUM_POSITIONS, num_slots=num_slots)),
        ):
            pass


def plan_batch(folder: Path, host_memory: str, **changes: int) -> OffloadPlan:
    request = OffloadRequest(host_memory, NUM_POSITIONS, goal=Goal.THROUGHPUT, **changes)
    with open_weights(folder) as weights:
        return plan_offload(folder, weights, request)


def fits(folder: Path, host_memory: str, batch_size: int) -> bool:
    try:
        plan_batch(folder, host_memory, batch_size=batch_size)
    except GenerationError:
        return False
    return True


def test_throughput_without_a_measurement_takes_the_largest_batch_that_fits(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    assert plan_batch(folder, "100%").batch_size == 32
    tier = plan_batch(folder, "1GiB", batch_size=11).tier
    host_memory = f"{tier.used_bytes - tier.expert_bytes * 22 // 24}B"
    fitting = [batch_size for batch_size in BATCH_SIZES if fits(folder, host_memory, batch_size)]
    assert 1 < fitting[-1] < 32
    assert plan_batch(folder, host_memory).batch_size == fitting[-1]
    latency = OffloadRequest(host_memory, NUM_POSITIONS)
    with load_offloaded(folder, latency) as offloaded:
        assert offloaded.plan.batch_size == 1
        assert "texts" not in offloaded.describe_plan()
    with load_offloaded(folder, replace(latency, goal=Goal.THROUGHPUT)) as offloaded:
        assert offloaded.plan.batch_size == fitting[-1]
        assert f"for keys and values of {40 * fitting[-1]} tokens of {fitting[-1]} texts at once" in (
            offloaded.describe_plan()
        )


@pytest.mark.parametrize("is_measured", [False, True])
def test_memory_is_kept_for_no_more_texts_than_there_are(
    is_measured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path, "mixtral")
    if is_measured:
        monkeypatch.setattr(
            "moesys.inference.offload_plan.find_saved_profile",
            lambda path: make_profile(layer_overhead_s=0.01),
        )
    assert plan_batch(folder, "1GiB").batch_size == 32
    for num_texts in (1, 3, 8):
        for batch_size in ({}, {"batch_size": 16}):
            plan = plan_batch(folder, "1GiB", num_texts=num_texts, **batch_size)
            assert plan.batch_size == num_texts
            assert (plan.predicted is not None) == is_measured
    assert plan_batch(folder, "1GiB", num_texts=30, batch_size=5).batch_size == 5


@pytest.mark.parametrize(
    ("stored", "told", "advice"),
    [
        (torch.bfloat16, "float32", "--dtype fp32"),
        (torch.float32, "bfloat16", "--dtype bf16"),
        (torch.float16, "float16", "--dtype fp32"),
    ],
)
def test_experts_are_stored_in_the_dtype_of_the_model(
    stored: torch.dtype, told: str, advice: str, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    folder = write_model(tmp_path / "model", "mixtral", stored)
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys | {"dtype": told}))
    with (
        pytest.raises(ModelFormatError, match=f"moesys pack MODEL --to FILE {advice}"),
        open_weights(folder),
    ):
        pass
    again = tmp_path / "again"
    convert_model(folder, again, parse_dtype(advice.split()[-1]), AS_PUBLISHED)
    with load_offloaded(again, OffloadRequest("1GiB", NUM_POSITIONS, num_slots=3)) as offloaded:
        found = generate_logits(offloaded.model, offloaded.execution)
    assert torch.equal(found, generate_logits(load_model(again)))


def test_experts_in_another_order_are_packed_first(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, GPT_OSS)
    with (
        pytest.raises(
            ModelFormatError, match=r"in another order .*; pack the model first: moesys pack MODEL"
        ),
        open_weights(tmp_path),
    ):
        pass


def test_experts_in_fp8_are_packed_first(tmp_path: Path) -> None:
    tensors = make_checkpoint(tmp_path, DEEPSEEK)
    for name in [name for name in tensors if ".experts." in name]:
        values, factors, _ = quantise_fp8(tensors[name], (8, 8), lambda factors: factors)
        tensors |= {name: values, f"{name}_scale_inv": factors}
    write_quantised(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [8, 8]})
    with (
        pytest.raises(ModelFormatError, match=r"is stored as FP8, .*; pack the model first"),
        open_weights(tmp_path),
    ):
        pass


def test_a_read_that_fails_twice_is_an_error_and_the_engine_goes_on_after_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    resident = generate_logits(load_model(folder))
    with load_offloaded(folder, OffloadRequest("1GiB", NUM_POSITIONS, num_slots=4)) as offloaded:
        reader = next(iter(offloaded.caches.values()))._reader
        read_at, left = reader._read_at, 7

        def fail(descriptor: int, buffer: memoryview, offset: int) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(5, "Input/output error")
            return read_at(descriptor, buffer, offset)

        reader._read_at = fail
        with pytest.raises(
            SectionReadError, match=r"model\.safetensors: section layer \d, expert \d at byte \d+"
        ):
            generate_logits(offloaded.model, offloaded.execution)
        reader._read_at = read_at
        assert torch.equal(generate_logits(offloaded.model, offloaded.execution), resident)


def change_expert(folder: Path, cache: SectionCache) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[cache._sections[(1, 3)].extents[1].offset + 5] ^= 4
    path.write_bytes(data)


def test_weights_that_changed_on_the_disk_are_noticed(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    path = folder / "model.safetensors"
    with load_offloaded(folder, OffloadRequest("1GiB", NUM_POSITIONS, num_slots=2)) as offloaded:
        generate_logits(offloaded.model, offloaded.execution)
        status = path.stat()
        change_expert(folder, next(iter(offloaded.caches.values())))
        with pytest.raises(SectionReadError, match=r"model\.safetensors was replaced or changed"):
            generate_logits(offloaded.model, offloaded.execution)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(SectionReadError, match=r"layer 1, expert 3 .* differs from its checksum"):
            generate_logits(offloaded.model, offloaded.execution)


def test_a_file_put_in_the_place_of_the_one_that_was_opened_is_noticed(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    with load_offloaded(folder, OffloadRequest("1GiB", NUM_POSITIONS)) as offloaded:
        (folder / "other").write_bytes((folder / "model.safetensors").read_bytes())
        (folder / "other").replace(folder / "model.safetensors")
        with pytest.raises(SectionReadError, match=r"model\.safetensors was replaced or changed"):
            generate_logits(offloaded.model, offloaded.execution)


def test_outside_its_context_a_model_computes_no_more(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    with load_offloaded(folder, OffloadRequest("1GiB", NUM_POSITIONS)) as offloaded:
        generate_logits(offloaded.model, offloaded.execution)
    with pytest.raises(SectionReadError, match="the files of this model were closed"):
        generate_logits(offloaded.model, offloaded.execution)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    model = Decoder(DecoderConfig(61, 32, (GQA,), (DenseConfig(20),), tie_embeddings=False))
    save_model(model, tmp_path, torch.float32, {})
    with (
        pytest.raises(
            ModelFormatError,
            match=r"has no experts that could stay on the disk: .* without --host-memory, and has nothing",
        ),
        open_weights(tmp_path),
    ):
        pass


def test_every_byte_of_a_budget_is_promised_to_something(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    budget = 260 * 2**20
    with load_offloaded(folder, OffloadRequest(f"{budget}B", NUM_POSITIONS)) as offloaded:
        tier, plan = offloaded.tier, offloaded.plan
        assert tier.capacity_bytes == budget
        assert tier.reserved["experts"] == sum(cache.pool.num_bytes for cache in offloaded.caches.values())
        assert tier.reserved["resident weights"] == plan.tier.core_bytes
        assert tier.reserved["keys and values"] == plan.tier.kv_bytes > 0
        assert tier.reserved_bytes == plan.tier.used_bytes <= budget
        generate_logits(offloaded.model, offloaded.execution)
        assert tier.used_bytes <= budget
    with load_offloaded(folder, OffloadRequest("80%", NUM_POSITIONS)) as offloaded:
        assert offloaded.tier.capacity_bytes is None
