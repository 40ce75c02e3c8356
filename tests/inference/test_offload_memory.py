"""Law 7 for experts on the disk: a run takes what its plan says, and writes on and on in the memory that it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesys.checkpoint import save_model
from moesys.inference import Engine, SequenceStep
from moesys.inference.offload import load_offloaded
from moesys.inference.offload_plan import OffloadRequest
from moesys.models import AttentionConfig, Decoder, DecoderConfig, RopeConfig, initialize_weights
from moesys.moe import MoEConfig
from moesys.planning.placement import RESERVE_BYTES
from moesys.units import parse_bytes
from peak_memory import MEASURE_PEAK

MIB = 2**20
BUDGET = "284MiB"
SLACK_BYTES = 16 * MIB
"""Of the reserve: what libraries take when they are first used, and what a run allocates beside its plan."""

SCRIPT = (
    MEASURE_PEAK
    + """
import json, sys, torch
from moesys.inference import Engine, SequenceStep
from moesys.inference.offload import load_offloaded
from moesys.inference.offload_plan import OffloadRequest

folder, budget = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)

def run():
    with load_offloaded(folder, OffloadRequest(budget, 150, predicts=True)) as offloaded:
        engine = Engine(offloaded.model, offloaded.execution, num_pages=offloaded.num_pages)
        sequence = engine.open_sequence(150)
        for start in (0, 64):
            engine.step([SequenceStep(sequence, start, [(7 * i) % 500 for i in range(start, start + 64)], 1)])
        for position in range(128, 150):
            engine.step([SequenceStep(sequence, position, [position % 500], 1)])
        tier = offloaded.plan.tier
        return {
            "planned": tier.core_bytes + tier.expert_bytes + tier.kv_bytes + tier.step_bytes,
            "experts": sum(section.num_bytes for section in offloaded.experts.sections.values()),
            "slots": tier.expert_bytes,
            "read": offloaded.stats.loaded_bytes,
        }

idle = read_resident()
found, peak = measure_peak(run)
print(json.dumps(found | {"peak": peak - idle}))
"""
)


def write_model(folder: Path, hidden_size: int, inner_size: int, num_experts: int) -> None:
    mixer = AttentionConfig(4, 2, 16, RopeConfig(16))
    layers = (MoEConfig(num_experts, 2, inner_size),) * 4
    config = DecoderConfig(500, hidden_size, (mixer,) * 4, layers, tie_embeddings=False, max_positions=1200)
    model = Decoder(config)
    initialize_weights(model, 0, std=0.3)
    save_model(model, folder, torch.float32, {})


def test_the_peak_is_within_the_budget_and_near_the_plan(tmp_path: Path) -> None:
    write_model(tmp_path, 256, 288, 16)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), BUDGET],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        # What is freed is given back at once, and nobody adds arenas of their own.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
    )
    found = json.loads(done.stdout)
    assert found["experts"] - found["slots"] > 1.5 * SLACK_BYTES, "more would not go unnoticed"
    assert found["read"] > 1.5 * found["experts"]
    assert found["peak"] > 0.8 * found["slots"]
    assert found["peak"] <= found["planned"] + SLACK_BYTES
    assert found["planned"] + RESERVE_BYTES <= parse_bytes(BUDGET, "--host-memory")


@pytest.mark.parametrize("predicts", [False, True])
def test_a_thousand_tokens_take_no_more_memory_than_a_hundred(predicts: bool, tmp_path: Path) -> None:
    write_model(tmp_path, 32, 16, 8)
    num_tokens, num_blocks = 1000, []
    request = OffloadRequest("1GiB", 16 + num_tokens, num_slots=12, predicts=predicts)
    with load_offloaded(tmp_path, request) as offloaded:
        engine = Engine(offloaded.model, offloaded.execution, num_pages=offloaded.num_pages)
        sequence = engine.open_sequence(16 + num_tokens)
        engine.step([SequenceStep(sequence, 0, [1] * 16, 1)])
        for position in range(16, 16 + num_tokens):
            engine.step([SequenceStep(sequence, position, [position * 13 % 500], 1)])
            if position % 20 == 0:
                num_blocks.append(sys.getallocatedblocks())
        (cache,) = offloaded.caches.values()
        assert len(cache._entries) <= 12
        assert cache.stats.num_loads > num_tokens, "tokens go on reading"
        assert (cache.stats.prefetch_used > 0) is predicts
    # The last fifth beside the second one: counters by expert have met every expert by then.
    assert max(num_blocks[40:]) - max(num_blocks[10:20]) < 300
