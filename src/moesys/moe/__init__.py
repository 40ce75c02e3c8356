"""Routing, the MoE layer and its two seams. Single-device PyTorch: knows nothing of ranks, files or memory tiers."""

from moesys.moe.dispatch import Dispatcher, LocalDispatcher, Part
from moesys.moe.execution import Execution
from moesys.moe.layer import MoEConfig, MoELayer
from moesys.moe.losses import compute_balance_loss, compute_router_z_loss
from moesys.moe.router import TopKRouter
from moesys.moe.routing import Routing, RoutingTape
from moesys.moe.source import ExpertBank, ExpertSource, ResidentSource
from moesys.moe.swiglu import SwiGLU
from moesys.moe.telemetry import ExpertLoad, LoadMeter

__all__ = [
    "Dispatcher",
    "Execution",
    "ExpertBank",
    "ExpertLoad",
    "ExpertSource",
    "LoadMeter",
    "LocalDispatcher",
    "MoEConfig",
    "MoELayer",
    "Part",
    "ResidentSource",
    "Routing",
    "RoutingTape",
    "SwiGLU",
    "TopKRouter",
    "compute_balance_loss",
    "compute_router_z_loss",
]
