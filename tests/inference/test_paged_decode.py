"""Single new tokens are attended to in place by the native kernel, unless another one is asked for."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import LATENT
from torch import Tensor

from moesys.inference import Engine, SequenceStep
from moesys.kernels import Kernel, native
from moesys.models import AttentionConfig, Decoder, DecoderConfig, MixerConfig, RopeConfig, initialize_weights
from moesys.moe import MoEConfig

VOCAB, LENGTHS = 50, (150, 63, 300)
MIXERS: dict[str, MixerConfig] = {
    "grouped": AttentionConfig(4, 2, 16, RopeConfig(16)),
    "sinks": AttentionConfig(4, 2, 16, RopeConfig(16), sliding_window=70, has_sinks=True),
    "latent": LATENT,
}
needs_native = pytest.mark.skipif(native.find_obstacle() is not None, reason="no native kernels here")


def make_model(mixer: MixerConfig) -> Decoder:
    model = Decoder(DecoderConfig(VOCAB, 64, (mixer,) * 2, (MoEConfig(4, 2, 16),) * 2, max_positions=400))
    initialize_weights(model, 0, std=0.3)
    return model.eval().requires_grad_(False)


def decode(model: Decoder, kernel: Kernel) -> tuple[Tensor, int]:
    """The logits of a step of single tokens, and those of one beside a prompt; and the calls of the kernel."""
    engine = Engine(model, model.make_resident_execution(kernel))
    numbers = torch.Generator().manual_seed(0)
    prompts = [torch.randint(VOCAB, (length,), generator=numbers).tolist() for length in LENGTHS]
    ids = [engine.open_sequence(length + 2) for length in LENGTHS]
    engine.step([SequenceStep(i, 0, prompt, 1) for i, prompt in zip(ids, prompts, strict=True)])
    calls: list[int] = []
    function = native.attend_pages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            native, "attend_pages", lambda *a, **k: (calls.append(a[0].shape[0]), function(*a, **k))[1]
        )
        logits = engine.step([SequenceStep(i, length, [7]) for i, length in zip(ids, LENGTHS, strict=True)])
        num_calls = len(calls)
        assert calls == [3] * num_calls
        newcomer = SequenceStep(engine.open_sequence(20), 0, prompts[0][:20], 1)
        lone = [SequenceStep(i, length + 1, [9]) for i, length in zip(ids, LENGTHS, strict=True)]
        logits += engine.step([lone[0], newcomer, *lone[1:]])
    return torch.cat(logits), num_calls


@needs_native
@pytest.mark.parametrize("name", MIXERS)
def test_the_kernel_chosen_attends(name: str) -> None:
    model = make_model(MIXERS[name])
    expected, num_calls = decode(model, Kernel.TORCH)
    assert num_calls == 0
    for kernel in (Kernel.AUTO, Kernel.NATIVE):
        found, num_calls = decode(model, kernel)
        assert num_calls == 2
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_native
def test_float64_is_attended_to_by_torch() -> None:
    model = make_model(MIXERS["grouped"]).double()
    _, num_calls = decode(model, Kernel.AUTO)
    assert num_calls == 0
