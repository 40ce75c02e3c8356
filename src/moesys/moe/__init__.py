"""Routing, the MoE layer and its two seams. Single-device PyTorch: knows nothing of ranks, files or memory tiers."""

from moesys.moe.balance import BiasBalancer, compute_selection_bias
from moesys.moe.cached_source import SHARE_TO_STREAM, CachedLayer, CachedSource
from moesys.moe.capacity import Capacity, CapacityFormula, DropBy, compute_positions
from moesys.moe.choice import Choice
from moesys.moe.config import MoEConfig
from moesys.moe.demand_tally import DemandTally
from moesys.moe.dispatch import Dispatcher, LocalDispatcher, Part
from moesys.moe.execution import Execution
from moesys.moe.expert_key import ExpertKey
from moesys.moe.layer import MoELayer
from moesys.moe.layers import find_layers, make_resident_source
from moesys.moe.linear import Linear, QuantizedLinear, quantize_linear
from moesys.moe.losses import (
    BalanceScope,
    compute_balance_loss,
    compute_first_choice_balance_loss,
    compute_router_z_loss,
    compute_sequence_balance_loss,
)
from moesys.moe.prediction_score import PredictionScore, ScoredPredictor
from moesys.moe.predictors import EarlyRouter, LastIteration, NextLayer, Predictor, SamplePaths
from moesys.moe.router import Router, TopKRouter
from moesys.moe.routing import Routing
from moesys.moe.routing_log import RoutingLog, RoutingRecorder
from moesys.moe.score import Score
from moesys.moe.selection import GroupLimitedTopK, GroupScore, Selection, Threshold, TopK
from moesys.moe.slot_layout import Int8Layout, PlainLayout, SlotLayout
from moesys.moe.source import (
    Bank,
    ExpertBank,
    ExpertSource,
    ModuleBank,
    QuantizedBank,
    ResidentSource,
    quantize_bank,
)
from moesys.moe.swiglu import SwiGLU
from moesys.moe.tape import RoutingTape
from moesys.moe.telemetry import ExpertLoad, LoadMeter
from moesys.moe.weighting import Normalization, SparseMixer, Weighting

__all__ = [
    "SHARE_TO_STREAM",
    "BalanceScope",
    "Bank",
    "BiasBalancer",
    "CachedLayer",
    "CachedSource",
    "Capacity",
    "CapacityFormula",
    "Choice",
    "DemandTally",
    "Dispatcher",
    "DropBy",
    "EarlyRouter",
    "Execution",
    "ExpertBank",
    "ExpertKey",
    "ExpertLoad",
    "ExpertSource",
    "GroupLimitedTopK",
    "GroupScore",
    "Int8Layout",
    "LastIteration",
    "Linear",
    "LoadMeter",
    "LocalDispatcher",
    "MoEConfig",
    "MoELayer",
    "ModuleBank",
    "NextLayer",
    "Normalization",
    "Part",
    "PlainLayout",
    "PredictionScore",
    "Predictor",
    "QuantizedBank",
    "QuantizedLinear",
    "ResidentSource",
    "Router",
    "Routing",
    "RoutingLog",
    "RoutingRecorder",
    "RoutingTape",
    "SamplePaths",
    "Score",
    "ScoredPredictor",
    "Selection",
    "SlotLayout",
    "SparseMixer",
    "SwiGLU",
    "Threshold",
    "TopK",
    "TopKRouter",
    "Weighting",
    "compute_balance_loss",
    "compute_first_choice_balance_loss",
    "compute_positions",
    "compute_router_z_loss",
    "compute_selection_bias",
    "compute_sequence_balance_loss",
    "find_layers",
    "make_resident_source",
    "quantize_bank",
    "quantize_linear",
]
