"""Scales on embedding, residuals and logits, the head's bias, and norms with mean and bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import DENSE, VOCAB, make_config, make_model, make_positions, make_tokens
from torch import Tensor
from torch.nn.functional import cross_entropy

from moesys.kernels import linear_cross_entropy
from moesys.models import Decoder, DocumentAttend, NormConfig, NormKind

TOKENS = make_tokens(2, 6)


def make(*, tie: bool = True, **options: Any) -> Decoder:
    model = make_model(replace(make_config(feed_forwards=(DENSE, DENSE), tie=tie), **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    return model


def run(model: Decoder) -> Tensor:
    return model(TOKENS, make_positions(2, 6), DocumentAttend(None)).hidden_BSD


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tie", [True, False])
def test_the_embedding_is_scaled_and_not_the_head(tie: bool) -> None:
    """An embedding that is larger by itself gives the same states; a tied head would then be larger too."""
    scaled, larger = make(tie=tie, embedding_scale=3.0), make(tie=tie)
    with torch.no_grad():
        larger.embedding.weight *= 3.0
    close(run(scaled), run(larger))
    head = larger.head_weight_VD / 3.0 if tie else larger.head_weight_VD
    close(scaled.compute_logits(run(scaled)), run(larger) @ head.T)


def test_what_a_block_adds_is_scaled() -> None:
    """As by output projections that are smaller by themselves."""
    scaled, smaller = make(residual_scale=0.3), make()
    with torch.no_grad():
        for name, parameter in smaller.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter *= 0.3
    close(run(scaled), run(smaller))
    assert not torch.allclose(run(scaled), run(make()))


def test_norms_with_mean_and_bias() -> None:
    model = make(norm=NormConfig(0.1, NormKind.LAYER))
    states: list[Tensor] = []
    handle = model.final_norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    hidden = run(model)
    handle.remove()
    x = states[0] - states[0].mean(-1, keepdim=True)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * model.final_norm.weight
    close(hidden, expected + model.final_norm.bias)
    assert sum("norm.bias" in name for name, _ in model.named_parameters()) == 5


@pytest.mark.parametrize("divisor", [1.0, 6.0])
@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_without_logits_is_that_of_the_logits(bias: bool, divisor: float) -> None:
    """Loss and the gradient of every parameter."""
    results = []
    for uses_logits in (True, False):
        model = make(tie=False, head_bias=bias, logit_divisor=divisor)
        hidden, targets = run(model).flatten(0, 1), TOKENS.flip(1).flatten()
        if uses_logits:
            head = model.head
            assert head is not None
            logits = (hidden @ head.weight.T + (head.bias if bias else 0)) / divisor
            close(model.compute_logits(hidden), logits)
            loss = cross_entropy(logits, targets, reduction="sum")
        else:
            loss = linear_cross_entropy(*model.prepare_loss(hidden), targets, 5)
        loss.backward()
        results.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (expected, gradients), (found, found_gradients) = results
    close(found, expected)
    assert ("head.bias" in gradients) == bias
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-9, atol=1e-11)


def test_a_head_without_bias_or_divisor_is_handed_over_as_it_is() -> None:
    model = make()
    hidden = run(model)
    states, weight = model.prepare_loss(hidden)
    assert states is hidden
    assert weight is model.embedding.weight
    assert weight.shape[0] == VOCAB
