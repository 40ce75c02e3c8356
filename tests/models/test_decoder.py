"""The decoder: what tokens see, its head, grouped queries, patterns of layers."""

from __future__ import annotations

import pytest
import torch
from small_models import DENSE, MOE, VOCAB, make_config, make_model, make_positions, make_tokens
from torch import Tensor
from torch.nn.functional import silu

from moesys.kernels import Kernel
from moesys.models import Decoder, DocumentAttend
from moesys.models.attend import SoftmaxRule, make_causal_mask
from moesys.models.attention import Attention
from moesys.models.decoder import Block
from moesys.models.norm import RMSNorm
from moesys.moe import MoELayer, SwiGLU


def run(
    model: Decoder, tokens: Tensor, attend: DocumentAttend | None = None, positions: Tensor | None = None
) -> Tensor:
    positions = make_positions(*tokens.shape) if positions is None else positions
    return model(tokens, positions, attend or DocumentAttend(None)).hidden_BSD


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_equals_the_formula_written_out() -> None:
    """One head at a time, the rotation as complex numbers, on one dense block with every bias."""
    model = make_model(make_config(feed_forwards=(DENSE,), tie=False, qkv_bias=True, output_bias=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.normal_()
    tokens = make_tokens(1, 5)

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def rotate(x_SD: Tensor) -> Tensor:
        frequencies = 10000.0 ** (-torch.arange(0, 6, 2, dtype=torch.float32) / 6)
        angles = torch.arange(5.0)[:, None] * frequencies
        rotated = torch.view_as_complex(torch.stack(x_SD.chunk(2, -1), -1)) * torch.polar(
            torch.ones(5, 3), angles
        )
        return torch.cat([rotated.real, rotated.imag], -1)

    block = model.blocks[0]
    assert isinstance(block, Block)
    assert isinstance(block.feed_forward, SwiGLU)
    a = block.mixer
    assert isinstance(a, Attention)
    assert a.q_norm is not None
    assert a.k_norm is not None
    x = model.embedding.weight[tokens[0]]
    qkv = a.qkv_proj(rms(x, block.input_norm.weight)).split(6, dim=-1)
    heads = []
    for head in range(4):
        q = rotate(rms(qkv[head], a.q_norm.weight))
        k = rotate(rms(qkv[4 + head // 2], a.k_norm.weight))
        scores = (q @ k.T / 6**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ qkv[6 + head // 2])
    x = x + torch.cat(heads, -1) @ a.o_proj.weight.T + a.o_proj.bias
    gate, up = (rms(x, block.post_mixer_norm.weight) @ block.feed_forward.gate_up_proj.weight.T).chunk(2, -1)
    x = x + (silu(gate) * up) @ block.feed_forward.down_proj.weight.T
    # The rotation is float32 in the model, so its float64 result agrees to that.
    torch.testing.assert_close(run(model, tokens)[0], rms(x, model.final_norm.weight), rtol=1e-5, atol=1e-6)


def test_packed_documents_equal_each_alone() -> None:
    model = make_model()
    lengths = (3, 1, 6)
    tokens = make_tokens(2, sum(lengths))
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    packed = run(model, tokens, DocumentAttend(ids), positions)
    alone = [run(model, document) for document in tokens.split(lengths, dim=1)]
    close(packed, torch.cat(alone, dim=1))
    assert not torch.allclose(packed, run(model, tokens))


def test_rows_may_have_different_documents() -> None:
    model = make_model()
    tokens = make_tokens(2, 6)
    ids = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1]])
    both = run(model, tokens, DocumentAttend(ids))
    for row in range(2):
        close(both[row : row + 1], run(model, tokens[row : row + 1], DocumentAttend(ids[row : row + 1])))


def test_attention_is_causal() -> None:
    model = make_model()
    tokens = make_tokens(1, 8)
    close(run(model, tokens)[:, :5], run(model, tokens[:, :5]))


class MaskedAttend:
    """Attention with an explicit mask, softmax written out."""

    def __init__(self, visible: Tensor) -> None:
        self._visible = visible

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * rule.scale
        return torch.einsum(
            "bhqk,bkhd->bqhd", scores.masked_fill(~self._visible, float("-inf")).softmax(-1), v
        )


@pytest.mark.parametrize("window", [1, 3, 8, 100])
@pytest.mark.parametrize("ids", [None, [0, 0, 0, 0, 0, 1, 1, 1]], ids=["one_document", "two_documents"])
def test_sliding_window_equals_an_explicit_mask(window: int, ids: list[int] | None) -> None:
    model = make_model(make_config(sliding_window=window))
    tokens = make_tokens(1, 8)
    visible = torch.tensor(
        [[0 <= i - j < window and (ids is None or ids[i] == ids[j]) for j in range(8)] for i in range(8)]
    )
    attend = DocumentAttend(None if ids is None else torch.tensor([ids]))
    expected = model(tokens, make_positions(1, 8), MaskedAttend(visible)).hidden_BSD
    close(run(model, tokens, attend), expected)


def test_one_attend_serves_layers_with_different_windows() -> None:
    """One record may serve several models and windows: nothing of the first may leak into the second."""
    attend = DocumentAttend(None)
    tokens = make_tokens(1, 8)
    for window in (2, 5, 2):
        model = make_model(make_config(sliding_window=window))
        assert torch.equal(run(model, tokens, attend), run(model, tokens))


def test_causal_mask() -> None:
    mask = make_causal_mask(3, 2, torch.device("cpu"))[0, 0]
    assert mask.tolist() == [[True, False, False], [True, True, False], [False, True, True]]


def test_grouped_queries_equal_repeated_key_value_heads() -> None:
    grouped = make_model(make_config(num_kv_heads=2))
    full = make_model(make_config(num_kv_heads=4))
    state = grouped.state_dict()
    for name in [name for name in state if "qkv_proj" in name]:
        q, k, v = state[name].split([24, 12, 12])
        repeated = [t.view(2, 6, -1).repeat_interleave(2, 0).view(24, -1) for t in (k, v)]
        state[name] = torch.cat([q, *repeated])
    full.load_state_dict(state)
    tokens = make_tokens(2, 7)
    close(run(grouped, tokens), run(full, tokens))


def test_tied_head_is_the_embedding_and_counted_once() -> None:
    tied, untied = make_model(make_config(tie=True)), make_model(make_config(tie=False))
    assert tied.head is None
    assert tied.head_weight_VD is tied.embedding.weight
    assert untied.head_weight_VD is not untied.embedding.weight
    assert untied.count_parameters() - tied.count_parameters() == VOCAB * 12
    for model in (tied, untied):
        hidden = run(model, make_tokens(1, 4))
        logits = model.compute_logits(hidden)
        assert logits.shape == (1, 4, VOCAB)
        close(logits, hidden @ model.head_weight_VD.T)
    tied.compute_logits(run(tied, make_tokens(1, 4))).sum().backward()
    untied.compute_logits(run(untied, make_tokens(1, 4))).sum().backward()
    assert all(p.grad is not None for m in (tied, untied) for p in m.parameters())


def test_layers_follow_the_pattern() -> None:
    wide = type(MOE)(num_experts=8, top_k=3, intermediate_size=4, shared_intermediate_size=5)
    model = make_model(make_config(feed_forwards=(DENSE, MOE, DENSE, wide)))
    kinds = [type(block.feed_forward) for block in model.blocks]
    assert kinds == [SwiGLU, MoELayer, SwiGLU, MoELayer]
    output = model(make_tokens(2, 3), make_positions(2, 3), DocumentAttend(None))
    assert {i: (r.num_experts, r.fixed_k, r.num_tokens) for i, r in output.routings.items()} == {
        1: (4, 2, 6),
        3: (8, 3, 6),
    }
    assert model.config.moe_layer_ids == [1, 3]


def test_kernels_agree() -> None:
    model = make_model()
    tokens, positions = make_tokens(2, 5), make_positions(2, 5)
    with torch.no_grad():
        outputs = [
            model(tokens, positions, DocumentAttend(None), model.make_resident_execution(kernel)).hidden_BSD
            for kernel in Kernel
            if kernel is not Kernel.NATIVE  # it takes no float64
        ]
    for output in outputs[1:]:
        close(output, outputs[0])


def test_rms_norm_of_bf16_takes_the_mean_square_in_float32() -> None:
    norm = RMSNorm(4096, 1e-6).bfloat16()
    x = torch.full((1, 4096), 3.0).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).float(), torch.ones(1, 4096), rtol=2**-8, atol=0)
