"""``runtime.kernel`` reaches every operator of a run, in its forward and backward passes and in its evaluations."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from tiny_runs import start
from torch import Tensor, nn

from moesys.errors import ConfigError
from moesys.kernels import Kernel
from moesys.kernels.choice import read_wish
from moesys.moe import Linear
from moesys.training import Trainer


class Wishes:
    """What operators would be told in the middle of a model, by the pass that asks."""

    def __init__(self, trainer: Trainer) -> None:
        self.forward: set[Kernel] = set()
        self.backward: set[Kernel] = set()
        linear = next(module for module in trainer.model.modules() if isinstance(module, Linear))
        linear.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.forward.add(read_wish())
        if output.requires_grad:
            output.register_hook(lambda gradient: self.backward.add(read_wish()))


@pytest.mark.parametrize("name", ["auto", "reference", "torch"])
@pytest.mark.parametrize("more", [(), ("memory.activation_checkpointing=true",)], ids=["kept", "recomputed"])
def test_the_kernel_is_known_everywhere_in_a_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, more: tuple[str, ...]
) -> None:
    monkeypatch.delenv("MOESYS_KERNEL", raising=False)
    trainer = start(corpus, tmp_path / "run", f"runtime.kernel={name}", *more)
    wishes = Wishes(trainer)
    trainer.take_step()
    assert wishes.forward == wishes.backward == {Kernel(name)}


def test_the_kernel_is_known_in_evaluations_and_in_the_whole_loop(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Kernel] = []
    monkeypatch.setattr(
        "moesys.training.log.measure_gemm_rate", lambda dtype, device: measured.append(read_wish()) or 1e12
    )
    trainer = start(corpus, tmp_path / "run", "runtime.kernel=reference")
    wishes = Wishes(trainer)
    trainer.evaluate(max_tokens=1)
    assert wishes.forward == {Kernel.REFERENCE}
    trainer.train()
    assert wishes.forward == wishes.backward == set(measured) == {Kernel.REFERENCE}
    assert read_wish() is Kernel.AUTO


@pytest.mark.parametrize(("chosen", "other"), [("reference", "torch_product"), ("torch", "reference")])
def test_dense_matrices_are_multiplied_by_the_kernel(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, other: str
) -> None:
    trainer = start(corpus, tmp_path / "run", f"runtime.kernel={chosen}")
    monkeypatch.setattr(import_module(f"moesys.kernels.linear.{other}"), "linear", pytest.fail)
    trainer.take_step()


def test_the_kernel_without_gradients_is_refused_before_anything_is_written(
    corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"kernel \(native\) computes no gradients, .*; use auto"):
        start(corpus, tmp_path / "run", "runtime.kernel=native")
    assert not (tmp_path / "run").exists()
