"""Loading needs the weights and a few pieces, also where a checkpoint stores a bank transposed and interleaved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peak_memory import MEASURE_PEAK

SCRIPT = (
    MEASURE_PEAK
    + """
import sys
import torch
from moesys.checkpoint import load_model, save_model
from moesys.models import FAMILIES, Decoder

folder, mode = Path(sys.argv[1]), sys.argv[2]
dtype = {"make": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}[mode]
family = next(family for family in FAMILIES if family.model_type == "gpt_oss")
if mode == "make":
    model = Decoder(family.read_config({
        "vocab_size": 100, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 18,
        "num_experts_per_tok": 2, "max_position_embeddings": 64, "sliding_window": 8, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }))
    save_model(model, folder, torch.float32, {}, family=family)
    sys.exit()
torch.zeros(1).to(torch.bfloat16)
idle = read_resident()
model, loading = measure_peak(lambda: load_model(folder, dtype))
(folder / mode).mkdir()
_, saving = measure_peak(lambda: save_model(model, folder / mode, dtype, {}, family=family))
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(weights, loading - idle, saving - idle)
"""
)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_transposed_bank_is_never_there_twice(tmp_path: Path) -> None:
    def run(mode: str) -> str:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), mode]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    run("make")
    largest = 18 * 4096 * 1024
    for mode, itemsize in (("fp32", 4), ("bf16", 2)):
        weights, loading, saving = (int(word) for word in run(mode).split())
        assert weights > 1.4 * largest * itemsize
        assert loading <= 1.02 * weights + 128 * 2**20 < weights + 4 * largest
        assert saving <= 1.02 * weights + 128 * 2**20
