"""Where NaN or Inf began, for the message of a run that has to stop.

Knows the order in which a decoder computes; does not know why a number overflowed. The idea: one forward and
backward pass of the step that failed, in which every place reports whether its output, and the gradient that
comes back to its output, is finite, and each router whether its logits are. A gradient is spoilt by the place after the
one where it arrives spoilt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesys.data import Batch
from moesys.errors import RoutingError
from moesys.models import Decoder
from moesys.training.step import TrainingStep

_HEAD = "the output head"


def find_first_nonfinite(model: Decoder, batches: Sequence[Batch], step: TrainingStep) -> str:
    """Runs the micro-batches of a step again and names the first place with NaN or Inf, such as
    ``layer 2, feed_forward`` or ``the backward pass of layer 2, attention``; for router logits also how many tokens.

    Leaves the parameters as they are and no gradients. Memory: that of a training step.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the parameter {name}"
    num_targets = sum(batch.num_targets for batch in batches)
    for batch in batches:
        place = _find_in_micro_batch(model, batch, num_targets, step)
        model.zero_grad(set_to_none=True)
        if place is not None:
            return place
    return "the norm of the gradients, or their sum over micro-batches (each gradient by itself is finite)"


def _find_in_micro_batch(model: Decoder, batch: Batch, num_targets: int, step: TrainingStep) -> str | None:
    trace = _Trace(model)
    with trace.attached():
        try:
            loss = step.compute_loss(batch, num_targets, checks_logits=True)
        except RoutingError as error:
            return trace.first_bad_output or str(error)
        if trace.first_bad_output is not None:
            return trace.first_bad_output
        if not torch.isfinite(loss.cross_entropy):
            return _HEAD
        if not torch.isfinite(loss.total):
            return "the balance loss or the router z-loss"
        loss.total.backward()
    return _describe_backward(trace, model)


def _describe_backward(trace: _Trace, model: Decoder) -> str | None:
    """Names the later in forward order of the place that spoilt a gradient and the parameter whose own is bad."""
    names = list(trace.places.values())
    bad_parameter = next(
        (name for name, p in reversed(list(model.named_parameters()))
         if p.grad is not None and not torch.isfinite(p.grad).all()), None
    )  # fmt: skip
    if trace.first_bad_gradient is None and bad_parameter is None:
        return None
    after_gradient = 0 if trace.first_bad_gradient is None else names.index(trace.first_bad_gradient) + 1
    owner = 0 if bad_parameter is None else trace.find_owner(bad_parameter)
    place = names[max(after_gradient, owner)]
    first = "" if bad_parameter is None else f"; the first parameter it reached is {bad_parameter}"
    return f"the backward pass of {place} (every activation of the forward pass is finite{first})"


class _Trace:
    """What each place of a decoder reports, in the order of one forward and backward pass."""

    def __init__(self, model: Decoder) -> None:
        self.places: dict[nn.Module | None, str] = {model.embedding: "the embedding"}
        """Modules in forward order; None stands for the head, which is no module where it is tied."""
        for layer_id, block in enumerate(model.blocks):
            self.places |= {child: f"layer {layer_id}, {name}" for name, child in block.named_children()}
        self.places |= {model.final_norm: "the final norm", None: _HEAD}
        self.first_bad_output: str | None = None
        self.first_bad_gradient: str | None = None
        """The place at whose output a spoilt gradient was met first, going backward."""
        self._model = model

    def find_owner(self, parameter: str) -> int:
        """Returns the place of a parameter as its index in forward order."""
        path = [self._model.get_submodule(parameter[:i]) for i, c in enumerate(parameter) if c == "."]
        owners = [i for i, module in enumerate(self.places) if module in path]
        return owners[0] if owners else len(self.places) - 1

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listens to the model while entered."""
        handles = [m.register_forward_hook(self._see_output) for m in self.places if m is not None]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        place = self.places[module]
        if self.first_bad_output is None and not torch.isfinite(tensor).all():
            self.first_bad_output = place

        def see_gradient(gradient: Tensor) -> None:
            if self.first_bad_gradient is None and not torch.isfinite(gradient).all():
                self.first_bad_gradient = place

        if tensor.requires_grad:
            tensor.register_hook(see_gradient)
