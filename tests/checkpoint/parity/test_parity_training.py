"""Law 4 for training: the gradients of transformers, and a model trained here that runs there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from oracle import Checkpoint, assert_same, compute_logits, load_theirs, make_tokens
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from family_keys import FAMILY_KEYS, VARIANT_KEYS
from moesys.checkpoint import load_model, save_model
from moesys.config import load_config
from moesys.data import Batch
from moesys.models import FAMILIES, Decoder, choose_family, initialize_weights
from moesys.moe import LoadMeter
from moesys.training.optimizer import MasterAdamW
from moesys.training.step import Objective, TrainingStep


def differentiate(logits: Tensor, tokens: Tensor, parameters: Iterable[nn.Parameter]) -> float:
    """Puts the gradients of a training step where the weights were; returns the loss."""
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.data = parameter.grad
    return loss.item()


@pytest.mark.parametrize("checkpoint", VARIANT_KEYS, indirect=True)
def test_gradients_of_a_training_step_are_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Gradients travel as a checkpoint, so that every tensor is compared under its own name.

    Ours in float64 are the oracle of both sides. Those of transformers are up to 1.1e-5 away by rounding alone.
    """
    tokens = make_tokens(length=20)
    theirs = load_theirs(checkpoint.folder)
    trained = (parameter for name, parameter in theirs.named_parameters() if "correction_bias" not in name)
    loss = differentiate(theirs(tokens).logits, tokens, trained)
    theirs.save_pretrained(tmp_path)
    models = [load_model(tmp_path)]
    for dtype in (torch.float32, torch.float64):
        ours = load_model(checkpoint.folder).to(dtype).requires_grad_(True)
        assert differentiate(compute_logits(ours, tokens), tokens, ours.parameters()) == pytest.approx(
            loss, rel=1e-6
        )
        models.append(ours)
    family = choose_family(models[0].config)
    for stored in zip(*(family.list_tensors(model) for model in models), strict=True):
        expected, found, exact = (entry.collect() for entry in stored)
        assert "experts" in stored[0].name or exact.any(), stored[0].name
        assert (found - exact).abs().max() <= 1e-5 * exact.abs().max(), stored[0].name
        assert (expected - exact).abs().max() <= 3e-5 * exact.abs().max(), stored[0].name


@pytest.mark.parametrize("model_type", FAMILY_KEYS)
def test_a_batch_that_was_learnt_here_is_known_there(model_type: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.model_type == model_type)
    model = Decoder(family.read_config(FAMILY_KEYS[model_type]))
    initialize_weights(model, seed=0, std=0.1)
    tokens = make_tokens(length=17)
    positions = torch.arange(16).expand(2, 16)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(positions), positions)
    config = load_config(None, ["training.learning_rate=0.02", "training.weight_decay=0"]).training
    step = TrainingStep(
        model,
        MasterAdamW(model, config, torch.float32),
        model.make_resident_execution(),
        Objective(balance_loss=0.01, router_z_loss=0.001, loss_chunk_tokens=10),
        gradient_clip=1.0,
        meter=LoadMeter(),
    )
    losses = [step.run([batch], 0.02).loss for _ in range(40)]
    assert losses[-1] < 0.1 * losses[0]
    model.eval().requires_grad_(False)
    assert save_model(model, tmp_path, torch.float32, {}, family=family).family is family
    theirs = load_theirs(tmp_path)
    with torch.no_grad():
        logits = theirs(tokens[:, :-1]).logits
    assert_same(compute_logits(model, tokens[:, :-1]), logits)
    assert cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item() < 0.1 * losses[0]
