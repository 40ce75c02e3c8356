"""Loading and saving a model need its weights and little more: 1.02 x the weights + 256 MiB above an idle process."""

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
from moesys.models import AttentionConfig, Decoder, DecoderConfig, QKNorm, RopeConfig
from moesys.moe import MoEConfig

folder, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "make":
    attention = AttentionConfig(8, 8, 96, RopeConfig(96), QKNorm.PER_HEAD)
    config = DecoderConfig(16000, 768, (attention,) * 2, (MoEConfig(32, 2, 1024),) * 2,
                           tie_embeddings=False)
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    save_model(model, folder, torch.float32, {})
    sys.exit()
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[mode]
torch.zeros(1).to(torch.bfloat16)
idle = read_resident()
model, loading = measure_peak(lambda: load_model(folder, dtype))
_, saving = measure_peak(lambda: save_model(model, Path(sys.argv[3]), dtype, {}))
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(weights, loading - idle, saving - idle)
"""
)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_loading_and_saving(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()

    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    run("make")
    for mode in ("fp32", "bf16"):
        (tmp_path / mode).mkdir()
        weights, loading, saving = (int(word) for word in run(mode, str(tmp_path / mode)).split())
        assert weights > 2**28
        allowed = 1.02 * weights + 256 * 2**20
        assert loading <= allowed
        assert saving <= allowed
