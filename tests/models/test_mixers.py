"""The mixers against their formulas, head by head: norms, clip and biases of grouped queries; the latent of MLA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import make_positions
from torch import Tensor

from moesys.errors import ShapeError
from moesys.models import (
    AttentionConfig,
    DocumentAttend,
    LatentAttentionConfig,
    QKNorm,
    RopeConfig,
    SoftmaxRule,
    YarnScaling,
)
from moesys.models.attention import Attention
from moesys.models.latent_attention import LatentAttention
from moesys.models.rotary import apply_rotation, compute_rotation

HIDDEN, LENGTH = 10, 7
PLAIN = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, rope=RopeConfig(4))
LATENT = LatentAttentionConfig(
    num_heads=3,
    query_rank=None,
    latent_rank=5,
    nope_head_dim=4,
    value_head_dim=7,
    rope=RopeConfig(2, is_interleaved=True),
)


def draw(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def make_x() -> Tensor:
    return torch.randn(2, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def turn(x_BSD: Tensor, rope: RopeConfig) -> Tensor:
    """The rotation, which has tests of its own, of one head."""
    rotation = compute_rotation(make_positions(2, LENGTH), rope)
    return apply_rotation(x_BSD.unsqueeze(2), rotation, rope).squeeze(2)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
    return (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def run(mixer: Attention | LatentAttention, x: Tensor) -> Tensor:
    rotation = compute_rotation(make_positions(*x.shape[:2]), mixer.config.rope)
    return mixer(x, rotation, DocumentAttend(None))


def assert_same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.arange(found.numel(), dtype=torch.float64).cos().view(found.shape)
    for got, want in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": True},
        {"output_bias": True, "softmax_scale": 0.7},
        {"qk_norm": QKNorm.PER_HEAD, "qkv_bias": True},
        {"qk_norm": QKNorm.WHOLE},
        {"qk_norm": QKNorm.WHOLE, "qkv_clip": 0.6, "qkv_bias": True},
        {"qkv_clip": 0.6},
    ],
    ids=str,
)
def test_grouped_queries_equal_one_head_at_a_time(options: dict[str, Any]) -> None:
    config = replace(PLAIN, **options)
    mixer = Attention(HIDDEN, config, 1e-3, layer_id=0)
    draw(mixer)
    x = make_x().requires_grad_()
    q, k, v = mixer.qkv_proj(x).split([24, 12, 12], dim=-1)
    if config.qk_norm is QKNorm.WHOLE:
        q, k = rms(q, mixer.q_norm.weight, 1e-3), rms(k, mixer.k_norm.weight, 1e-3)
    if config.qkv_clip is not None:
        limit = config.qkv_clip
        assert all((tensor.abs() > limit).any() for tensor in (q, k, v))
        q, k, v = (tensor.clamp(-limit, limit) for tensor in (q, k, v))
    heads = []
    for head in range(4):
        own = slice(6 * head, 6 * head + 6)
        shared = slice(6 * (head // 2), 6 * (head // 2) + 6)
        q_h, k_h = q[..., own], k[..., shared]
        if config.qk_norm is QKNorm.PER_HEAD:
            q_h, k_h = rms(q_h, mixer.q_norm.weight, 1e-3), rms(k_h, mixer.k_norm.weight, 1e-3)
        scale = 6**-0.5 if config.softmax_scale is None else config.softmax_scale
        heads.append(attend(turn(q_h, config.rope), turn(k_h, config.rope), v[..., shared], scale))
    expected = torch.cat(heads, -1) @ mixer.o_proj.weight.T
    if config.output_bias:
        expected = expected + mixer.o_proj.bias
    assert_same(run(mixer, x), expected, [x, *mixer.parameters()])


LATENTS: dict[str, dict[str, Any]] = {
    "one-projection": {},
    "latent-queries-and-biases": {"query_rank": 6, "bias": True},
    "half-split": {"rope": RopeConfig(2)},
    "scaled": {"softmax_scale": 0.9, "rope": RopeConfig(2, scaling=YarnScaling(4.0, 8), is_interleaved=True)},
    "values-wider-than-keys": {"value_head_dim": 9},
    "values-as-wide-as-keys": {"value_head_dim": 6},
    "values-narrower": {"value_head_dim": 3, "latent_epsilon": 0.1},
}


@pytest.mark.parametrize("name", LATENTS)
def test_latent_attention_equals_one_head_at_a_time(name: str) -> None:
    c = replace(LATENT, **LATENTS[name])
    mixer = LatentAttention(HIDDEN, c, layer_id=0)
    draw(mixer)
    x = make_x().requires_grad_()
    if c.query_rank is None:
        q = x @ mixer.q_proj.weight.T
    else:
        low = x @ mixer.q_a_proj.weight.T + mixer.q_a_proj.bias
        q = rms(low, mixer.q_a_norm.weight, c.latent_epsilon) @ mixer.q_b_proj.weight.T
    latent = x @ mixer.kv_a_proj.weight.T + (mixer.kv_a_proj.bias if c.bias else 0)
    shared = turn(latent[..., 5:], c.rope)
    kv = rms(latent[..., :5], mixer.kv_a_norm.weight, c.latent_epsilon) @ mixer.kv_b_proj.weight.T
    width = 4 + c.value_head_dim
    heads = []
    for head in range(3):
        q_h, kv_h = q[..., 6 * head : 6 * head + 6], kv[..., width * head : width * head + width]
        q_h = torch.cat([q_h[..., :4], turn(q_h[..., 4:], c.rope)], -1)
        k_h = torch.cat([kv_h[..., :4], shared], -1)
        scale = 6**-0.5 if c.softmax_scale is None else c.softmax_scale
        heads.append(attend(q_h, k_h, kv_h[..., 4:], scale))
    expected = torch.cat(heads, -1) @ mixer.o_proj.weight.T
    if c.bias:
        expected = expected + mixer.o_proj.bias
    assert_same(run(mixer, x), expected, [x, *mixer.parameters()])


class LatentAttend(DocumentAttend):
    """Asks for latents, as a cache does."""

    caches_latents = True

    def __init__(self) -> None:
        super().__init__(None)
        self.key_shapes: list[torch.Size] = []

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor | None, rule: SoftmaxRule) -> Tensor:
        assert v is None
        assert rule.value_size is not None
        self.key_shapes.append(k.shape[2:])
        return super().__call__(layer_id, q, k, v, rule)


@pytest.mark.parametrize("length", [1, 4, LENGTH])
@pytest.mark.parametrize("name", LATENTS)
def test_attention_to_latents_equals_that_to_what_they_expand_to(name: str, length: int) -> None:
    """Up to 8 and up to 14 tokens, which are multiplied in different ways."""
    config = replace(LATENT, **LATENTS[name])
    mixer = LatentAttention(HIDDEN, config, layer_id=0)
    draw(mixer)
    x = make_x()[:, :length].requires_grad_()
    rotation = compute_rotation(make_positions(2, length), config.rope)
    attend = LatentAttend()
    found = mixer(x, rotation, attend)
    assert_same(found, mixer(x, rotation, DocumentAttend(None)), [x, *mixer.parameters()])
    assert attend.key_shapes == [(cached.num_heads, cached.size) for cached in config.cached] == [(1, 7)]


@pytest.mark.parametrize("lengths", [(1, 5), (1, 8), (9, 40)], ids=str)
@torch.no_grad()
def test_a_latents_bits_do_not_depend_on_how_many_tokens_there_are(lengths: tuple[int, int]) -> None:
    """A bmm of torch over all tokens gives other bits for one than for five."""
    mixer = LatentAttention(
        64, replace(LATENT, latent_rank=96, nope_head_dim=48, value_head_dim=40), layer_id=0
    )
    draw(mixer)
    mixer.float()
    x = torch.randn(1, lengths[1], 64, generator=torch.Generator().manual_seed(2))
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(LatentAttend):
        def __call__(
            self, layer_id: int, q: Tensor, k: Tensor, v: Tensor | None, rule: SoftmaxRule
        ) -> Tensor:
            seen.append((q, k))
            return q[..., : rule.value_size]

    outputs = [
        mixer(x[:, :n], compute_rotation(make_positions(1, n), mixer.config.rope), Watched()) for n in lengths
    ]
    few = lengths[0]
    assert torch.equal(seen[0][0], seen[1][0][:, :few])
    assert torch.equal(seen[0][1], seen[1][1][:, :few])
    assert torch.equal(outputs[0], outputs[1][:, :few])


def test_gradcheck_of_latent_attention() -> None:
    mixer = LatentAttention(HIDDEN, replace(LATENT, query_rank=3, bias=True), layer_id=0)
    draw(mixer)
    x = make_x()[:1, :3]
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def compute(x: Tensor, *values: Tensor) -> Tensor:
        rotation = compute_rotation(make_positions(1, 3), mixer.config.rope)
        return torch.func.functional_call(
            mixer, dict(zip(names, values, strict=True)), (x, rotation, DocumentAttend(None))
        )

    # One random direction instead of every element: fast, and as hard to pass.
    assert torch.autograd.gradcheck(compute, (x.requires_grad_(), *parameters), fast_mode=True)


def test_latent_attention_names_its_sizes() -> None:
    assert (LATENT.num_kv_heads, LATENT.key_dim, LATENT.value_dim, LATENT.sliding_window) == (3, 6, 7, None)
    assert LATENT.scale == 6**-0.5
    assert LATENT.latent_key_dim == 7
    assert replace(LATENT, softmax_scale=0.9).scale == 0.9
    assert (PLAIN.key_dim, PLAIN.value_dim, PLAIN.scale) == (6, 6, 6**-0.5)
    with pytest.raises(ShapeError, match=r"rotary dimensions \(8\) must not exceed head_dim \(6\)"):
        replace(PLAIN, rope=RopeConfig(8))
