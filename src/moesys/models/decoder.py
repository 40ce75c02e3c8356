"""The decoder: embedding, blocks of mixer and feed-forward, final norm, output head.

Plain single-device PyTorch. What tokens see (`Attend`) and how experts are reached (`Execution`) are arguments.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesys.kernels import Int8Weight, Kernel, linear
from moesys.kernels.choice import hold_environment
from moesys.models.attend import Attend
from moesys.models.config import DecoderConfig, DenseConfig
from moesys.models.rotary import Rotation, compute_rotation
from moesys.moe import (
    Execution,
    Linear,
    LocalDispatcher,
    MoELayer,
    ResidentSource,
    Routing,
    RoutingTape,
    SwiGLU,
)


@dataclass(frozen=True)
class DecoderOutput:
    """What a forward pass returns.

    hidden_BSD:  (batch, sequence, hidden) after the final norm; `Decoder.compute_logits` turns it into logits.
    routings:    the Routing of each MoE layer by layer id.
    """

    hidden_BSD: Tensor
    routings: dict[int, Routing]


class Block(nn.Module):
    """A mixer and a dense or MoE feed-forward layer, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer_id: int) -> None:
        super().__init__()
        feed_forward = config.feed_forwards[layer_id]
        self.residual_scale = config.residual_scale
        self.input_norm = config.norm.make(config.hidden_size)
        self.mixer = config.mixers[layer_id].make(config.hidden_size, config.norm, layer_id)
        self.post_mixer_norm = config.norm.make(config.hidden_size)
        self.feed_forward: MoELayer | SwiGLU = (
            SwiGLU(config.hidden_size, feed_forward.intermediate_size, bias=feed_forward.bias)
            if isinstance(feed_forward, DenseConfig)
            else MoELayer(config.hidden_size, feed_forward, layer_id=layer_id)
        )

    def forward(
        self, x_BSD: Tensor, rotation: Rotation | None, attend: Attend, execution: Execution
    ) -> tuple[Tensor, Routing | None]:
        """Returns the residual stream and, for a MoE layer, its Routing."""
        x_BSD = self._add(x_BSD, self.mixer(self.input_norm(x_BSD), rotation, attend))
        normed_BSD, feed_forward = self.post_mixer_norm(x_BSD), self.feed_forward
        if isinstance(feed_forward, MoELayer):
            y_BSD, routing = feed_forward(normed_BSD, execution)
            return self._add(x_BSD, y_BSD), routing
        return self._add(x_BSD, feed_forward(normed_BSD)), None

    def _add(self, x_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        return x_BSD + (y_BSD if self.residual_scale == 1.0 else y_BSD * self.residual_scale)


class Decoder(nn.Module):
    """A decoder-only transformer for every family that moesys knows."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer_id) for layer_id in range(config.num_layers))
        self.final_norm = config.norm.make(config.hidden_size)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        )

    def forward(
        self, token_ids_BS: Tensor, positions_BS: Tensor, attend: Attend, execution: Execution | None = None
    ) -> DecoderOutput:
        """Runs (batch, sequence) int64 tokens at their positions; without an `Execution` everything is resident."""
        if execution is None:
            execution = self.make_resident_execution()
        # A compiler cannot follow context variables, and reads the environment once anyway.
        with nullcontext() if torch.compiler.is_compiling() else hold_environment():
            return self._run_blocks(token_ids_BS, positions_BS, attend, execution)

    def _run_blocks(
        self, token_ids_BS: Tensor, positions_BS: Tensor, attend: Attend, execution: Execution
    ) -> DecoderOutput:
        ropes = [mixer.rope for mixer in self.config.mixers]
        rotations = {
            rope: None if rope is None else compute_rotation(positions_BS, rope) for rope in set(ropes)
        }
        x_BSD = self.embedding(token_ids_BS)
        if self.config.embedding_scale != 1.0:
            x_BSD = x_BSD * self.config.embedding_scale
        routings: dict[int, Routing] = {}
        run_block = _run_recomputed if execution.recompute else _run
        for layer_id, block in enumerate(self.blocks):
            x_BSD, routing = run_block(block, x_BSD, rotations[ropes[layer_id]], attend, execution)
            if routing is not None:
                routings[layer_id] = routing
        return DecoderOutput(self.final_norm(x_BSD), routings)

    @property
    def head_weight_VD(self) -> Tensor | Int8Weight:
        """(vocabulary, hidden): the output head, which is the embedding table where the two are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Returns (..., vocabulary) logits of (..., hidden) states, in their dtype."""
        logits = linear(hidden, self.head_weight_VD, None if self.head is None else self.head.bias)
        return logits if self.config.logit_divisor == 1.0 else logits / self.config.logit_divisor

    def prepare_loss(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (..., inner) states and a (vocabulary, inner) weight whose product is the logits, for a loss that
        never holds them all: the divisor is taken from the states, a bias is one more column, and int8 weights are
        widened."""
        if self.config.logit_divisor != 1.0:
            hidden = hidden / self.config.logit_divisor
        weight = self.head_weight_VD
        if isinstance(weight, Int8Weight):
            weight = weight.unpack(hidden.dtype)
        if self.head is None or self.head.bias is None:
            return hidden, weight
        ones = hidden.new_full((*hidden.shape[:-1], 1), 1 / self.config.logit_divisor)
        return torch.cat([hidden, ones], dim=-1), torch.cat([weight, self.head.bias.unsqueeze(1)], dim=1)

    def make_resident_execution(self, kernel: Kernel = Kernel.AUTO, *, recompute: bool = False) -> Execution:
        """Returns the execution in which every token and every expert stays where it is."""
        banks = {i: block.feed_forward.experts for i, block in enumerate(self.blocks)
                 if isinstance(block.feed_forward, MoELayer)}  # fmt: skip
        return Execution(LocalDispatcher(), ResidentSource(banks), kernel, recompute=recompute)

    def count_parameters(self) -> int:
        """Returns the number of weights, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def _run(
    block: nn.Module, x_BSD: Tensor, rotation: Rotation | None, attend: Attend, execution: Execution
) -> tuple[Tensor, Routing | None]:
    return block(x_BSD, rotation, attend, execution)


def _run_recomputed(
    block: nn.Module, x_BSD: Tensor, rotation: Rotation | None, attend: Attend, execution: Execution
) -> tuple[Tensor, Routing | None]:
    """Keeps only the block's input; the backward pass computes it again with the same choice of experts."""
    tape = RoutingTape()
    return checkpoint(
        block,
        x_BSD,
        rotation,
        attend,
        replace(execution, tape=tape),
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=tape.make_contexts,
    )
