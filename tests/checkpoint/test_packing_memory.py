"""Packing needs one expert or one other weight, and some tens of MiB, whatever the size of the model."""

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
from moesys.checkpoint import save_model
from moesys.checkpoint.packed_form import PackedForm
from moesys.checkpoint.packing import pack_model
from moesys.models import FAMILIES, Decoder

folder, mode = Path(sys.argv[1]), sys.argv[2]
family = next(family for family in FAMILIES if family.model_type == "gpt_oss")
if mode == "make":
    model = Decoder(family.read_config({
        "vocab_size": 100, "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 24,
        "num_experts_per_tok": 2, "max_position_embeddings": 64, "sliding_window": 8, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }))
    save_model(model, folder, torch.bfloat16, {}, family=family)
    sys.exit()
torch.zeros(1).to(torch.bfloat16)
idle = read_resident()
target = folder.with_name(f"{folder.name}.{mode}")
packed, packing = measure_peak(lambda: pack_model(folder, target, form=PackedForm(mode)))
print(packed.num_bytes, packing - idle)
"""
)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_packing(tmp_path: Path) -> None:
    def run(mode: str) -> str:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), mode]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    (tmp_path / "model").mkdir()
    run("make")
    expert_bytes = 3 * 1024 * 1024 * 2
    for mode in ("float", "int8"):
        num_bytes, peak = (int(word) for word in run(mode).split())
        assert num_bytes > 150 * 2**20
        assert peak <= 4 * expert_bytes + 80 * 2**20 < num_bytes
