"""Routers and selection biases that a family keeps in float32 stay so in a bfloat16 checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from family_keys import FAMILY_KEYS
from moesys.checkpoint import load_model, save_model
from moesys.models import FAMILIES, Decoder, initialize_weights

BY_TYPE = {family.model_type: family for family in FAMILIES}


@pytest.mark.parametrize(
    ("model_type", "is_kept"),
    [
        ("deepseek_v2", True),
        ("deepseek_v3", True),
        ("glm4_moe", True),
        ("minimax_m2", False),
        ("qwen3_moe", False),
    ],
)
def test_a_router_is_written_as_its_family_keeps_it(model_type: str, is_kept: bool, tmp_path: Path) -> None:
    family = BY_TYPE[model_type]
    model = Decoder(family.read(FAMILY_KEYS[model_type]))
    initialize_weights(model, seed=0)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            assert "selection_bias" in name
            buffer.copy_(torch.linspace(0.1, 0.9, buffer.numel()))
    save_model(model, tmp_path, torch.bfloat16, {}, family=family)
    stored = load_file(tmp_path / "model.safetensors")
    routers = {name: t for name, t in stored.items() if "gate.weight" in name or "correction_bias" in name}
    assert routers
    assert {t.dtype for t in routers.values()} == {torch.float32 if is_kept else torch.bfloat16}
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    if is_kept:
        again, ours = load_model(tmp_path).state_dict(), model.state_dict()
        kept = [name for name in ours if "router" in name]
        assert all(torch.equal(again[name], ours[name]) for name in kept)
