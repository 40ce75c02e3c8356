"""Dense AdamW over float32 master weights, decay by role.

Parameters that compute in bfloat16 have a float32 master each; float32 parameters are their own masters. An
expert without tokens has a zero gradient and still decays its weights and moments, as in torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moesys.config import TrainingConfig
from moesys.errors import CheckpointError
from moesys.models import Decoder, Role, classify_parameters

_DECAYED = {Role.PROJECTION, Role.EXPERT, Role.ROUTER}
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class MasterAdamW:
    """`torch.optim.AdamW` (fused) on master weights, with the model's parameters as their rounded copies."""

    def __init__(self, model: Decoder, config: TrainingConfig, dtype: torch.dtype) -> None:
        """Casts every parameter but the routers' to ``dtype``, keeping what it was as the float32 master."""
        roles = classify_parameters(model)
        self._parameters = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        self._masters: dict[str, Tensor] = {}
        self._master_gradients: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if dtype == torch.float32 or roles[name] is Role.ROUTER:
                self._masters[name] = parameter
            else:
                self._masters[name] = parameter.detach().clone()
                parameter.data = parameter.data.to(dtype)
        decayed = [self._masters[name] for name, role in roles.items() if role in _DECAYED]
        undecayed = [self._masters[name] for name, role in roles.items() if role not in _DECAYED]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )

    def accumulate_gradients(self) -> None:
        """Adds the gradients of a backward pass to the masters' float32 ones, and drops them where they differ."""
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                # Into the same buffer at every step: fresh ones would be faulted in page by page.
                buffer = self._master_gradients.get(name)
                master.grad = parameter.grad.float() if buffer is None else buffer.copy_(parameter.grad)
                self._master_gradients[name] = master.grad
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def collect_gradients(self) -> list[Tensor]:
        """Returns the masters' gradients, float32; an expert without tokens has zeros."""
        self.accumulate_gradients()
        for master in self._masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self._masters.values() if master.grad is not None]

    def step(self, learning_rate: float) -> None:
        """Updates masters and model from the collected gradients, then drops the gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])
        self.discard_gradients()

    def discard_gradients(self) -> None:
        """Drops all gradients; parameters stay as they are."""
        for parameter in (*self._parameters.values(), *self._masters.values()):
            parameter.grad = None

    def export_state(self) -> dict[str, Tensor]:
        """Returns masters and buffers, such as balance biases, as ``model.NAME`` and the moments as
        ``optimizer.MOMENT.NAME``: views, no copies."""
        state = {f"model.{name}": tensor.detach() for name, tensor in (self._masters | self._buffers).items()}
        for name, master in self._masters.items():
            for moment, value in self._adamw.state.get(master, {}).items():
                state[f"optimizer.{moment}.{name}"] = value
        return state

    @torch.no_grad()
    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `export_state` gave: moments on the masters' device become the optimizer's own, without a
        copy. Raises `CheckpointError` for a missing or misshapen tensor."""
        for name, tensor in (self._masters | self._buffers).items():
            saved = state.get(f"model.{name}")
            if saved is None or saved.shape != tensor.shape:
                found = "missing" if saved is None else f"of shape {tuple(saved.shape)}"
                raise CheckpointError(
                    f"the checkpoint's model.{name} is {found}, the model needs {tuple(tensor.shape)}; "
                    "resume with the config that the run was started with"
                )
            tensor.copy_(saved)
        for name, master in self._masters.items():
            if master is not self._parameters[name]:
                self._parameters[name].copy_(master)
            moments = {
                m: state[f"optimizer.{m}.{name}"] for m in _MOMENTS if f"optimizer.{m}.{name}" in state
            }
            if moments:
                self._adamw.state[master] = {m: value.to(master.device) for m, value in moments.items()}
