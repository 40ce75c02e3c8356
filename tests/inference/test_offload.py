"""Law 2: a model whose experts come from the disk gives the bits of the resident one, for any number of slots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesys.checkpoint import load_model, open_offloaded, save_model
from moesys.errors import GenerationError, ModelFormatError, SectionReadError
from moesys.inference import Engine, SequenceStep
from moesys.inference.offload import RESERVE_BYTES, count_kv_bytes, load_offloaded, plan_memory
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
        with load_offloaded(folder, 2**30, num_positions=NUM_POSITIONS, num_slots=num_slots) as offloaded:
            found = generate_logits(offloaded.model, offloaded.execution)
            stats = offloaded.cache.stats
        assert torch.equal(found, resident), num_slots
        assert stats.num_loads > 2 * total or num_slots == total
        assert num_slots < total or stats.num_loads == total


def test_the_plan_spends_the_budget_and_no_more(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    with open_offloaded(folder) as weights:
        kv_bytes = count_kv_bytes(weights.model) * NUM_POSITIONS
        slot_bytes = 3 * 24 * 32 * 4
        fixed = weights.resident_bytes + kv_bytes + RESERVE_BYTES
        whole = sum(p.numel() * 4 for p in load_model(folder).parameters())
        assert weights.resident_bytes == whole - 24 * slot_bytes
        for num_slots in (2, 5, 23):
            for spare in (0, slot_bytes - 1):
                plan = plan_memory(fixed + num_slots * slot_bytes + spare, weights, kv_bytes)
                assert plan.num_slots == num_slots
                assert f"{num_slots} of 24 experts" in plan.describe()
        assert plan_memory(2**40, weights, kv_bytes).num_slots == 24
        with pytest.raises(GenerationError, match=r"host memory .* is less than .* raise --host-memory"):
            plan_memory(fixed + 2 * slot_bytes - 1, weights, kv_bytes)


def test_a_read_that_fails_twice_is_an_error_and_the_engine_goes_on_after_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    resident = generate_logits(load_model(folder))
    with load_offloaded(folder, 2**30, num_positions=NUM_POSITIONS, num_slots=4) as offloaded:
        reader = offloaded.cache._reader
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


def test_weights_that_changed_on_the_disk_are_noticed(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    with load_offloaded(folder, 2**30, num_positions=NUM_POSITIONS, num_slots=2) as offloaded:
        generate_logits(offloaded.model, offloaded.execution)
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        extent = offloaded.cache._sections[(1, 3)].extents[1]
        data[extent.offset + 5] ^= 4
        path.write_bytes(data)
        with pytest.raises(SectionReadError, match=r"layer 1, expert 3 .* differs from its checksum"):
            generate_logits(offloaded.model, offloaded.execution)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    model = Decoder(DecoderConfig(61, 32, (GQA,), (DenseConfig(20),), tie_embeddings=False))
    save_model(model, tmp_path, torch.float32, {})
    with (
        pytest.raises(ModelFormatError, match="has no experts that could stay on the disk"),
        open_offloaded(tmp_path),
    ):
        pass
