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
from moesys.models import Decoder, DocumentAttend

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
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral-window-tied": ("Mixtral", MIXTRAL | {"sliding_window": 4, "tie_word_embeddings": True}),
}


def make_theirs(name: str) -> Any:
    family, keys = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**keys, attn_implementation="eager")
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


def test_loads_with_the_same_logits(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    tokens = make_tokens()
    with torch.no_grad():
        assert_same(compute_logits(load_model(tmp_path), tokens), theirs(tokens).logits)


def test_written_folders_load_in_transformers(
    theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several shards, which is also the index's test."""
    monkeypatch.setattr(hf, "_MAX_SHARD_BYTES", 20_000)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    exported = save_model(ours, tmp_path / "ours", torch.float32, {})
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert exported.family.model_type == theirs.config.model_type
    tokens = make_tokens()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    with torch.no_grad():
        assert_same(compute_logits(ours, tokens), again(tokens).logits)
        assert torch.equal(
            compute_logits(load_model(tmp_path / "ours"), tokens), compute_logits(ours, tokens)
        )


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


@pytest.mark.parametrize("name", ["qwen3", "qwen3-dense-layers-and-biases", "mixtral"])
def test_gradients_of_a_training_step_are_the_same(name: str, tmp_path: Path) -> None:
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).requires_grad_(True)
    tokens = make_tokens()
    for logits in (compute_logits(ours, tokens), theirs(tokens).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs_grads = dict(theirs.named_parameters())
    assert_same(ours.embedding.weight.grad, theirs_grads["model.embed_tokens.weight"].grad)
    for layer, block in enumerate(ours.blocks):
        prefix = f"model.layers.{layer}"
        q_rows = block.attention.config.num_heads * block.attention.config.head_dim
        q_grad = theirs_grads[f"{prefix}.self_attn.q_proj.weight"].grad
        assert_same(block.attention.qkv_proj.weight.grad[:q_rows], q_grad)
        if f"{prefix}.mlp.gate.weight" in theirs_grads:
            assert_same(
                block.feed_forward.router.weight_ED.grad, theirs_grads[f"{prefix}.mlp.gate.weight"].grad
            )
            down_grad = theirs_grads[f"{prefix}.mlp.experts.down_proj"].grad
            assert_same(block.feed_forward.experts.down_EDF.grad, down_grad)


def test_the_older_place_of_rope_theta_is_read(tmp_path: Path) -> None:
    make_theirs("qwen3").save_pretrained(tmp_path)
    before = load_model(tmp_path).config
    keys = json.loads((tmp_path / "config.json").read_text())
    keys["rope_theta"] = keys.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert load_model(tmp_path).config == before
