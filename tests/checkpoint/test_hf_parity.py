"""Law 4: checkpoints of transformers give its logits and gradients here; those written here give ours there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesys.checkpoint import hf, load_model, save_model
from moesys.inference import Engine, SequenceStep
from moesys.models import Decoder, DocumentAttend, choose_family

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
QWEN3: dict[str, Any] = {**BASE, "num_experts": 6, "moe_intermediate_size": 20, "intermediate_size": 28}
MIXTRAL: dict[str, Any] = {**BASE, "num_local_experts": 6, "intermediate_size": 20}
CASES = {
    "qwen3": ("Qwen3Moe", QWEN3 | {"norm_topk_prob": True}),
    "qwen3-unnormalised-tied": ("Qwen3Moe", QWEN3 | {"norm_topk_prob": False, "tie_word_embeddings": True}),
    "qwen3-dense-layers-and-biases": (
        "Qwen3Moe",
        QWEN3 | {"norm_topk_prob": True, "mlp_only_layers": [1], "attention_bias": True},
    ),
    "qwen3-every-other-layer": ("Qwen3Moe", QWEN3 | {"norm_topk_prob": True, "decoder_sparse_step": 2}),
    "qwen3-window": (
        "Qwen3Moe",
        QWEN3 | {"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 5},
    ),
    "qwen3-wide-heads-long-waves": (
        "Qwen3Moe",
        QWEN3 | {"head_dim": 20, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen3-one-kv-head-one-expert": (
        "Qwen3Moe",
        QWEN3 | {"num_key_value_heads": 1, "num_experts_per_tok": 1},
    ),
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral-heads-from-the-width": ("Mixtral", MIXTRAL | {"head_dim": None, "num_key_value_heads": 4}),
    "mixtral-window-tied": ("Mixtral", MIXTRAL | {"sliding_window": 4, "tie_word_embeddings": True}),
}


def make_theirs(name: str, **implementation: str) -> Any:
    family, keys = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**keys, attn_implementation="eager", **implementation)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def make_tokens(batch: int = 2, length: int = 17) -> Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(1))


def compute_logits(model: Decoder, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return model.compute_logits(model(tokens, positions, DocumentAttend(None)).hidden_BSD)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture(params=CASES)
def theirs(request: pytest.FixtureRequest) -> Any:
    return make_theirs(request.param)


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_loads_with_the_same_logits(theirs: Any, tmp_path: Path, max_shard_size: str) -> None:
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / hf.INDEX_NAME).exists() == (max_shard_size == "20KB")
    tokens = make_tokens()
    with torch.no_grad():
        assert_same(compute_logits(load_model(tmp_path), tokens), theirs(tokens).logits)


@pytest.mark.parametrize("max_shard_bytes", [2**31, 20_000])
def test_written_folders_load_in_transformers(theirs: Any, tmp_path: Path, max_shard_bytes: int) -> None:
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    exported = save_model(ours, tmp_path / "ours", torch.float32, {}, max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert sorted(exported.files) == files
    assert ("model.safetensors" in files) == (hf.INDEX_NAME not in files) == (max_shard_bytes > 20_000)
    assert exported.family.model_type == theirs.config.model_type
    tokens = make_tokens()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    with torch.no_grad():
        assert_same(compute_logits(ours, tokens), again(tokens).logits)
    read_back = load_model(tmp_path / "ours")
    assert read_back.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(read_back.parameters(), ours.parameters(), strict=True))


def test_decoding_token_by_token_gives_the_logits_of_one_pass(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    [tokens] = make_tokens(batch=1).tolist()
    engine = Engine(load_model(tmp_path))
    sequence = engine.open_sequence(len(tokens))
    steps = [tokens[:3], tokens[3:9], *([t] for t in tokens[9:])]
    logits, start = [], 0
    for step in steps:
        logits += engine.step([SequenceStep(sequence, start, step)])
        start += len(step)
    with torch.no_grad():
        assert_same(torch.cat(logits), theirs(torch.tensor([tokens])).logits[0])


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3-unnormalised-tied", "qwen3-dense-layers-and-biases", "qwen3-window", "mixtral"]
)
def test_gradients_of_a_training_step_are_the_same(name: str, tmp_path: Path) -> None:
    """Gradients travel as a checkpoint, so that every tensor is compared under its own name."""
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path / "weights")
    ours = load_model(tmp_path / "weights").requires_grad_(True)
    tokens = make_tokens()
    for logits in (compute_logits(ours, tokens), theirs(tokens).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for parameter in (*ours.parameters(), *theirs.parameters()):
        assert parameter.grad is not None
        parameter.data = parameter.grad
    theirs.save_pretrained(tmp_path / "gradients")
    expected = load_model(tmp_path / "gradients")
    for (label, found), (_, reference) in zip(
        choose_family(ours.config).iterate_tensors(ours),
        choose_family(ours.config).iterate_tensors(expected),
        strict=True,
    ):
        assert "experts" in label or reference.any(), label
        assert_same(found, reference)


def test_bfloat16_keeps_the_routers_in_float32(tmp_path: Path) -> None:
    theirs = make_theirs("qwen3", experts_implementation="eager")
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "router" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "router" not in name} == {torch.bfloat16}
    tokens = make_tokens()
    with torch.no_grad():
        exact = theirs(tokens).logits
        rounded = compute_logits(model, tokens).float()
        limit = 1.5 * (theirs.bfloat16()(tokens).logits.float() - exact).square().mean().sqrt()
    assert (rounded - exact).square().mean().sqrt() <= limit


def test_the_older_place_of_rope_theta_is_read(tmp_path: Path) -> None:
    make_theirs("qwen3").save_pretrained(tmp_path)
    before = load_model(tmp_path).config
    keys = json.loads((tmp_path / "config.json").read_text())
    keys["rope_theta"] = keys.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert load_model(tmp_path).config == before
