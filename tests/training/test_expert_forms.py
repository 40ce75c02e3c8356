"""The form of the experts: it trains, its biases learn without decay, and export names what no layout holds."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from tiny_runs import STEPS, resume, start

from moesys.errors import ModelFormatError
from moesys.models import Role, classify_parameters
from moesys.training import PlainConsole, Trainer, export_run

FORMS = {
    "gelu": ("model.expert_activation=gelu",),
    "relu-bias": ("model.expert_activation=relu", "model.expert_bias=true"),
    "swiglu-bias": ("model.expert_bias=true",),
    "clamped": ("model.expert_activation=clamped_swiglu", "model.expert_limit=0.5", "model.expert_bias=true"),
    "residual": ("model.expert_activation=gelu", "model.expert_bias=true", "model.residual_expert=true"),
}


def find_biases(trainer: Trainer) -> dict[str, torch.Tensor]:
    roles = classify_parameters(trainer.model)
    return {
        name: parameter
        for name, parameter in trainer.model.named_parameters()
        if roles[name] is Role.BIAS and ".experts." in name
    }


@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS.keys())
def test_every_form_learns_and_resumes(corpus: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    trainer = start(corpus, tmp_path / "run", "training.learning_rate=0.02", *settings)
    biases = find_biases(trainer)
    assert len(biases) == (2 if "model.expert_bias=true" in settings else 0)
    assert not any(bias.any() for bias in biases.values())
    losses = [trainer.take_step().loss for _ in range(6)]
    assert losses[-1] < losses[0] - 0.1
    assert all(bias.any() for bias in biases.values())
    trainer.save()
    again = resume(tmp_path / "run")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name


def test_forms_are_different_functions(corpus: Path, tmp_path: Path) -> None:
    clamped = "model.expert_activation=clamped_swiglu"
    runs = [("model.expert_activation=swiglu",), (clamped,), (clamped, "model.expert_alpha=0.5")]
    runs += [("model.expert_activation=gelu",), ("model.expert_activation=relu",)]
    losses = {
        start(corpus, tmp_path / str(number), "model.init_std=0.3", *settings).take_step().loss
        for number, settings in enumerate(runs)
    }
    assert len(losses) == len(runs)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (FORMS["gelu"], ["form.activation (model.expert_activation) would be swiglu, the model's is gelu"]),
        (FORMS["swiglu-bias"], ["expert_bias (model.expert_bias) would be False, the model's is True"]),
        (
            FORMS["clamped"],
            ["clamped_swiglu", "form.limit (model.expert_limit) would be 7.0, the model's is 0.5"],
        ),
        (("model.capacity_factor=0.75",), ["capacity (model.capacity_factor) would be None", "0.75"]),
    ],
    ids=["gelu", "bias", "clamped", "capacity"],
)
def test_export_names_what_no_layout_holds_and_training_says_so_before(
    corpus: Path, tmp_path: Path, settings: tuple[str, ...], names: list[str]
) -> None:
    config = start(corpus, tmp_path / "told", *settings).config
    trainer = Trainer.start(config, tmp_path / "run", PlainConsole(STEPS, output := io.StringIO()))
    assert "`moesys export` will refuse it" in output.getvalue()
    trainer.take_step()
    trainer.save()
    with pytest.raises(ModelFormatError, match="no Hugging Face layout holds this model") as caught:
        export_run(tmp_path / "run", tmp_path / "model", None, on_damage=pytest.fail)
    for name in names:
        assert name in str(caught.value)
        assert name in output.getvalue()
    assert not (tmp_path / "model").exists()


def test_a_capacity_factor_of_zero_is_a_dropless_model_to_export(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run", "model.capacity_factor=0", "model.capacity_formula=tutel")
    trainer.train()
    assert export_run(tmp_path / "run", tmp_path / "model", None, on_damage=pytest.fail).family == "qwen3_moe"
