"""A step with NaN or Inf changes nothing, is recorded, and stops the run when it keeps happening."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import start
from torch import nn

from moesys.errors import NonFiniteError
from moesys.moe import Routing
from moesys.training import Trainer
from moesys.training.diagnose import find_first_nonfinite
from moesys.training.metrics import read_metrics


def poison(trainer: Trainer, name: str) -> torch.Tensor:
    """Writes a NaN into a parameter and returns what was there."""
    parameter = dict(trainer.model.named_parameters())[name]
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[0] = float("nan")
    return before


def test_a_skipped_step_leaves_every_bit(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run")
    trainer.take_step()
    name = "final_norm.weight"
    before = poison(trainer, name)
    state = {key: tensor.clone() for key, tensor in trainer.optimizer.export_state().items()}
    result = trainer.take_step()
    assert not result.is_finite
    after = trainer.optimizer.export_state()
    assert all(torch.equal(state[key], after[key]) for key in state if key != f"model.{name}")
    with torch.no_grad():
        dict(trainer.model.named_parameters())[name].copy_(before)
    assert trainer.take_step().is_finite


@pytest.mark.parametrize(
    ("parameter", "place"),
    [
        ("embedding.weight", "the parameter embedding.weight"),
        ("blocks.1.mixer.qkv_proj.weight", "the parameter blocks.1.mixer.qkv_proj.weight"),
        ("blocks.0.feed_forward.experts.down_EDF", "the parameter blocks.0.feed_forward.experts.down_EDF"),
        ("blocks.0.feed_forward.router.weight_ED", "the parameter blocks.0.feed_forward.router.weight_ED"),
    ],
)
def test_a_run_that_stays_nan_stops_and_names_the_place(
    corpus: Path, tmp_path: Path, parameter: str, place: str
) -> None:
    trainer = start(corpus, tmp_path / "run", "training.max_skipped_steps=3")
    poison(trainer, parameter)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .*it began in ") as caught:
        trainer.train()
    assert place in str(caught.value)
    assert "lower training.learning_rate" in str(caught.value)
    events = read_metrics(tmp_path / "run" / "metrics.jsonl").events
    assert [event.event for event in events] == ["skipped_step"] * 3


@pytest.mark.parametrize("layer", [0, 1])
def test_activations_that_overflow_are_traced_to_their_layer(
    corpus: Path, tmp_path: Path, layer: int
) -> None:
    trainer = start(corpus, tmp_path / "run", "training.max_skipped_steps=2")
    attention = trainer.model.blocks[layer].mixer
    attention.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    with pytest.raises(NonFiniteError, match=f"it began in layer {layer}, mixer"):
        trainer.train()


def test_a_good_step_resets_the_count(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = start(corpus, tmp_path / "run", "training.max_skipped_steps=2")
    take_step: Callable = trainer.take_step
    name = "final_norm.weight"

    def take_every_other_step_with_nan():
        if trainer.step % 2:
            return take_step()
        before = poison(trainer, name)
        result = take_step()
        with torch.no_grad():
            dict(trainer.model.named_parameters())[name].copy_(before)
        return result

    monkeypatch.setattr(trainer, "take_step", take_every_other_step_with_nan)
    assert trainer.train().is_finished


def test_a_nan_batch_is_found_in_whichever_micro_batch_it_is(corpus: Path, tmp_path: Path) -> None:
    trainer = start(
        corpus, tmp_path / "run", "training.micro_batch_sequences=1", "training.max_skipped_steps=1"
    )
    calls = 0

    def spoil_the_third_micro_batch(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * float("nan") if calls % 4 == 3 else output

    trainer.model.blocks[1].feed_forward.register_forward_hook(spoil_the_third_micro_batch)
    with pytest.raises(NonFiniteError, match="it began in layer 1, feed_forward"):
        trainer.train()


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("embedding", "the embedding"),
        ("blocks.0.feed_forward", "layer 0, feed_forward"),
        ("blocks.1.post_mixer_norm", "layer 1, post_mixer_norm"),
        ("final_norm", "the final norm"),
    ],
)
def test_the_first_bad_activation_is_named(corpus: Path, tmp_path: Path, module: str, place: str) -> None:
    trainer = start(corpus, tmp_path / "run")
    trainer.model.get_submodule(module).register_forward_hook(
        lambda module, inputs, output: (
            (output[0] * float("inf"), *output[1:]) if isinstance(output, tuple) else output * float("inf")
        )
    )
    assert find_first_nonfinite(trainer.model, trainer._load_batches(0), trainer._training_step) == place


@pytest.mark.parametrize("more", [(), ("memory.activation_checkpointing=true",), ("training.dtype=bf16",)])
def test_router_logits_are_named_with_layer_and_tokens(
    corpus: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    trainer = start(corpus, tmp_path / "run", "training.max_skipped_steps=1", *more)

    def overflow(module: nn.Module, inputs: object, routing: Routing) -> Routing:
        assert routing.logits_TE is not None
        is_bad_TE = torch.zeros_like(routing.logits_TE, dtype=torch.bool)
        is_bad_TE[[3, 5, 9], 1] = True
        logits_TE = routing.logits_TE.masked_fill(is_bad_TE, float("nan"))
        return replace(routing, logits_TE=logits_TE, weights=routing.weights * float("nan"))

    trainer.model.get_submodule("blocks.0.feed_forward.router").register_forward_hook(overflow)
    with pytest.raises(
        NonFiniteError,
        match="it began in layer 0: router logits are NaN or Inf for 3 of 64 tokens; look for NaN",
    ):
        trainer.train()


def test_a_router_that_got_nan_is_not_where_it_began(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run")
    norm = trainer.model.get_submodule("blocks.0.input_norm")
    norm.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    found = find_first_nonfinite(trainer.model, trainer._load_batches(0), trainer._training_step)
    assert found == "layer 0, input_norm"


def test_logits_that_overflow_are_the_heads_fault(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run", "model.tie_embeddings=false")
    assert trainer.model.head is not None
    with torch.no_grad():
        trainer.model.head.weight.fill_(3e38)
    found = find_first_nonfinite(trainer.model, trainer._load_batches(0), trainer._training_step)
    assert found == "the output head"


def spoil_gradient(module: nn.Module, only_weight: bool = False) -> None:
    """Makes the backward pass of a module give NaN to its input, or only to its first parameter."""
    if only_weight:
        next(module.parameters()).register_hook(lambda gradient: gradient * float("nan"))
        return

    def spoil_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        first = inputs[0].clone()
        first.register_hook(lambda gradient: gradient * float("nan"))
        return (first, *inputs[1:])

    module.register_forward_pre_hook(spoil_input)


def test_gradients_alone_are_the_backward_passs_fault(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run", "training.max_skipped_steps=1")
    spoil_gradient(trainer.model.blocks[0].mixer)
    before = {key: tensor.clone() for key, tensor in trainer.optimizer.export_state().items()}
    with pytest.raises(NonFiniteError, match=r"it began in the backward pass of layer 0, mixer \(every"):
        trainer.train()
    after = trainer.optimizer.export_state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    [event] = read_metrics(tmp_path / "run" / "metrics.jsonl").events
    assert event.step == 1
    assert "gradient norm nan" in event.message


@pytest.mark.parametrize("more", [(), ("memory.activation_checkpointing=true",), ("training.dtype=bf16",)])
@pytest.mark.parametrize("only_weight", [False, True], ids=["input", "weight"])
@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("blocks.0.input_norm", "layer 0, input_norm"),
        ("blocks.0.mixer", "layer 0, mixer"),
        ("blocks.0.feed_forward", "layer 0, feed_forward"),
        ("blocks.1.post_mixer_norm", "layer 1, post_mixer_norm"),
        ("blocks.1.feed_forward", "layer 1, feed_forward"),
        ("final_norm", "the final norm"),
    ],
)
def test_the_place_that_spoilt_the_gradient_is_named(
    corpus: Path, tmp_path: Path, module: str, place: str, only_weight: bool, more: tuple[str, ...]
) -> None:
    trainer = start(corpus, tmp_path / "run", *more)
    spoil_gradient(trainer.model.get_submodule(module), only_weight)
    found = find_first_nonfinite(trainer.model, trainer._load_batches(0), trainer._training_step)
    assert found.startswith(f"the backward pass of {place} (")
    assert not only_weight or f"the first parameter it reached is {module}." in found
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_finite_gradients_whose_squares_overflow_are_the_norms_fault(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run", "training.max_skipped_steps=1")
    trainer.model.final_norm.weight.register_hook(lambda gradient: gradient.sign() * 1e30)
    with pytest.raises(NonFiniteError, match="it began in the norm of the gradients"):
        trainer.train()


def test_the_diagnosis_never_holds_all_logits(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = start(corpus, tmp_path / "run")
    monkeypatch.setattr(trainer.model, "compute_logits", lambda hidden: pytest.fail("all logits at once"))
    find_first_nonfinite(trainer.model, trainer._load_batches(0), trainer._training_step)


def test_the_diagnosis_leaves_no_hooks(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run")
    find_first_nonfinite(trainer.model, trainer._load_batches(0), trainer._training_step)
    assert not any(module._forward_hooks for module in trainer.model.modules())
