"""The output head and loss over chunks of tokens, gradients computed while a chunk's logits are at hand.

The loss is a sum, so its gradient with respect to the logits is known up to one scalar before the backward pass
begins: softmax minus one-hot. Each chunk's logits are turned into that gradient in place and multiplied into the
gradients of hidden states and weight at once; the backward pass only scales them. The idea is that of the fused
linear cross entropy of Liger Kernel (arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesys.kernels.cross_entropy.target import IGNORED_TARGET
from moesys.kernels.products import multiply


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, target_ids_T: Tensor, chunk_tokens: int
) -> Tensor:
    """See `moesys.kernels.cross_entropy.api.linear_cross_entropy`."""
    # Inside `forward` grad mode is always off, so whether gradients are wanted is asked here.
    keeps = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, target_ids_T, chunk_tokens, keeps)  # pyrefly: ignore


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, target_ids_T: Tensor, chunk_tokens: int, keeps: bool
    ) -> Tensor:
        needs_hidden, needs_weight = (keeps and needed for needed in ctx.needs_input_grad[:2])
        loss_dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        loss = torch.zeros((), dtype=loss_dtype, device=hidden_TD.device)
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=loss_dtype) if needs_weight else None
        for start in range(0, hidden_TD.shape[0], chunk_tokens):
            hidden_CD = hidden_TD[start : start + chunk_tokens]
            targets_C = target_ids_T[start : start + chunk_tokens]
            is_target_C = targets_C != IGNORED_TARGET
            index_C1 = targets_C.masked_fill(~is_target_C, 0).unsqueeze(1)
            logits_CV = multiply(hidden_CD, weight_VD.t()).to(loss_dtype)
            # In place: each row is read before it is written (a test compares the bits with a fresh result).
            log_probs_CV = torch.log_softmax(logits_CV, dim=1, out=logits_CV)
            loss -= (log_probs_CV.gather(1, index_C1).squeeze(1) * is_target_C).sum()
            if not (needs_hidden or needs_weight):
                continue
            grad_logits_CV = log_probs_CV.exp_()
            grad_logits_CV.scatter_add_(1, index_C1, grad_logits_CV.new_full((1, 1), -1).expand_as(index_C1))
            if not bool(is_target_C.all()):
                grad_logits_CV.mul_(is_target_C.unsqueeze(1))
            grad_logits_CV = grad_logits_CV.to(hidden_TD.dtype)
            if grad_hidden_TD is not None:
                multiply(grad_logits_CV, weight_VD, grad_hidden_TD[start : start + chunk_tokens])
            if grad_weight_VD is None:
                continue
            if hidden_TD.dtype == loss_dtype:
                multiply(grad_logits_CV.t(), hidden_CD, grad_weight_VD, adds=True)
            else:
                grad_weight_VD += grad_logits_CV.t() @ hidden_CD
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        return (
            None if grad_hidden_TD is None else grad_hidden_TD * grad_loss,
            None if grad_weight_VD is None else (grad_weight_VD * grad_loss).to(ctx.weight_dtype),
            None,
            None,
            None,
        )
