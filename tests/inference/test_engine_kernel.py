"""The kernel of an engine's `Execution` computes the dense matrices too."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import assert_same, compute_full_logits, make_decoder

from moesys.inference import Engine, SequenceStep
from moesys.kernels import Kernel, native


@pytest.mark.parametrize("kernel", [Kernel.AUTO, Kernel.NATIVE, Kernel.TORCH])
def test_the_kernel_reaches_every_matrix(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("compute_linear", "compute_experts", "compute_experts_summed", "compute_product"):
        function = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda *args, name=name, function=function: (calls.append(name), function(*args))[1]
        )
    model = make_decoder()
    engine = Engine(model, model.make_resident_execution(kernel))
    token_ids = [3, 1, 4, 1, 5]
    (logits,) = engine.step([SequenceStep(engine.open_sequence(5), 0, token_ids)])
    assert set(calls) == (set() if kernel is Kernel.TORCH else {"compute_linear", "compute_experts_summed"})
    with torch.no_grad():
        assert_same(logits, compute_full_logits(model, token_ids))
