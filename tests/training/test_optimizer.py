"""The optimizer against torch.optim.AdamW, its roles, its float32 masters and its state."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_runs import SETTINGS
from torch import Tensor

from moesys.config import Config, load_config
from moesys.errors import CheckpointError
from moesys.models import Decoder
from moesys.training.build import build_model
from moesys.training.optimizer import MasterAdamW

CONFIG = load_config(
    None,
    [*SETTINGS, "model.attention_bias=true", "model.tie_embeddings=false", "training.weight_decay=0.5"],
)
UNDECAYED = ("embedding.", "norm.", ".bias")


def make_model(config: Config = CONFIG) -> Decoder:
    return build_model(config, vocab_size=300)


def draw_gradients(model: Decoder, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def step(optimizer: MasterAdamW, learning_rate: float = 1e-2) -> None:
    optimizer.collect_gradients()
    optimizer.step(learning_rate)


def is_decayed(name: str) -> bool:
    return not any(part in name for part in UNDECAYED)


def test_it_is_adamw_of_torch_in_bits() -> None:
    model = make_model()
    twin = copy.deepcopy(model)
    optimizer = MasterAdamW(model, CONFIG.training, torch.float32)
    names = dict(twin.named_parameters())
    reference = torch.optim.AdamW(
        [
            {"params": [p for n, p in names.items() if is_decayed(n)], "weight_decay": 0.5},
            {"params": [p for n, p in names.items() if not is_decayed(n)], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    for seed in range(3):
        draw_gradients(model, seed)
        draw_gradients(twin, seed)
        step(optimizer)
        reference.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, names[name]), name


def test_decay_goes_by_role_and_reaches_experts_without_tokens() -> None:
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    step(MasterAdamW(model, CONFIG.training, torch.float32), learning_rate=0.1)
    shrunk = {name for name, parameter in model.named_parameters() if torch.all(parameter == 0.95)}
    kept = {name for name, parameter in model.named_parameters() if torch.all(parameter == 1.0)}
    assert shrunk == {name for name, _ in model.named_parameters() if is_decayed(name)}
    assert kept == {name for name, _ in model.named_parameters() if not is_decayed(name)}
    assert "blocks.0.feed_forward.experts.down_EDF" in shrunk
    assert "head.weight" in shrunk
    assert "blocks.0.mixer.qkv_proj.bias" in kept


def test_moments_of_an_expert_without_tokens_decay() -> None:
    model = make_model()
    optimizer = MasterAdamW(model, CONFIG.training, torch.float32)
    draw_gradients(model, 0)
    step(optimizer)
    name = "optimizer.exp_avg.blocks.0.feed_forward.experts.down_EDF"
    before = optimizer.export_state()[name].clone()
    step(optimizer)
    torch.testing.assert_close(optimizer.export_state()[name], before * 0.9)


def test_updates_smaller_than_a_bf16_ulp_add_up() -> None:
    model = make_model()
    optimizer = MasterAdamW(model, CONFIG.training, torch.bfloat16)
    weight = model.final_norm.weight
    assert weight.dtype == torch.bfloat16
    seen = []
    for _ in range(6):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        step(optimizer, learning_rate=1e-3)
        seen.append(weight[0].item())
    master = optimizer.export_state()["model.final_norm.weight"]
    assert master.dtype == torch.float32
    assert master[0].item() == pytest.approx(1 - 6e-3, abs=1e-6)
    assert seen[0] == 1.0
    assert seen[-1] == torch.tensor(1 - 6e-3).bfloat16().item() < 1.0


def test_in_bf16_only_the_routers_stay_float32() -> None:
    model = make_model()
    optimizer = MasterAdamW(model, CONFIG.training, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    routers = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert routers == {"blocks.0.feed_forward.router.weight_ED"}
    assert {t.dtype for t in optimizer.export_state().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_goes_to_another_optimizer_in_bits(dtype: torch.dtype) -> None:
    first = make_model()
    optimizer = MasterAdamW(first, CONFIG.training, dtype)
    draw_gradients(first, 0)
    step(optimizer)
    saved = {name: tensor.clone() for name, tensor in optimizer.export_state().items()}
    second = make_model(load_config(None, [*SETTINGS, "model.attention_bias=true",
                                           "model.tie_embeddings=false", "training.seed=5"]))  # fmt: skip
    other = MasterAdamW(second, CONFIG.training, dtype)
    other.import_state(saved)
    for seed in (1, 2):
        draw_gradients(first, seed)
        draw_gradients(second, seed)
        step(optimizer)
        step(other)
    expected, found = optimizer.export_state(), other.export_state()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    parameters = dict(second.named_parameters())
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in first.named_parameters())


def test_imported_moments_are_taken_over_without_a_copy() -> None:
    model = make_model()
    optimizer = MasterAdamW(model, CONFIG.training, torch.float32)
    draw_gradients(model, 0)
    step(optimizer)
    saved = {name: tensor.clone() for name, tensor in optimizer.export_state().items()}
    other = MasterAdamW(make_model(), CONFIG.training, torch.float32)
    other.import_state(saved)
    for name, tensor in other.export_state().items():
        assert (tensor.data_ptr() == saved[name].data_ptr()) is name.startswith("optimizer."), name


@pytest.mark.parametrize(
    ("saved", "found"),
    [(None, "is missing"), (torch.zeros(3), r"is of shape \(3,\), the model needs \(16,\)")],
)
def test_a_state_that_does_not_fit_is_refused(saved: Tensor | None, found: str) -> None:
    optimizer = MasterAdamW(make_model(), CONFIG.training, torch.float32)
    state = optimizer.export_state()
    if saved is None:
        del state["model.final_norm.weight"]
    else:
        state["model.final_norm.weight"] = saved
    with pytest.raises(CheckpointError, match=f"model.final_norm.weight {found}"):
        optimizer.import_state(state)
