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
from moesys.inference.offload import load_offloaded
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
        with load_offloaded(folder, "1GiB", num_positions=NUM_POSITIONS, num_slots=num_slots) as offloaded:
            found = generate_logits(offloaded.model, offloaded.execution)
            stats = offloaded.cache.stats
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
        with load_offloaded(folder, f"{share:.6f}%", num_positions=NUM_POSITIONS) as offloaded:
            assert offloaded.cache.pool.num_slots == num_slots
            assert f"{num_slots} of 24 experts" in offloaded.describe_plan()
    with load_offloaded(folder, "100%", num_positions=NUM_POSITIONS) as offloaded:
        assert offloaded.cache.pool.num_slots == 24
        generate_logits(offloaded.model, offloaded.execution)
        assert "read from the disk in 24 experts, 0 of them never used" in offloaded.describe_traffic()


@pytest.mark.parametrize("host_memory", ["1%", "200MiB"])
def test_an_impossible_budget_is_refused_with_the_sum(host_memory: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    with (
        pytest.raises(
            GenerationError, match=r"--host-memory .* is less than resident weights .* \+ 2 experts .* = "
        ),
        load_offloaded(folder, host_memory, num_positions=NUM_POSITIONS),
    ):
        pass


def test_a_read_that_fails_twice_is_an_error_and_the_engine_goes_on_after_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral")
    resident = generate_logits(load_model(folder))
    with load_offloaded(folder, "1GiB", num_positions=NUM_POSITIONS, num_slots=4) as offloaded:
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
    with load_offloaded(folder, "1GiB", num_positions=NUM_POSITIONS, num_slots=2) as offloaded:
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
