"""What this machine can do, measured, and what of a model fits where: the numbers that plans are made from."""

from moesys.planning.activity import Activity, make_activity
from moesys.planning.budget import Budget, parse_budget
from moesys.planning.ceilings import choose_faster_dtype, measure_gemm_rate, measure_memory_read_rate
from moesys.planning.footprint import Footprint, compute_kv_bytes_per_token, compute_state_bytes
from moesys.planning.machine import (
    read_device_bytes,
    read_disk,
    read_free_ram_bytes,
    read_machine,
    read_ram_bytes,
)
from moesys.planning.machine_profile import (
    MachineProfile,
    find_profile,
    find_profile_path,
    read_profiles,
)
from moesys.planning.placement import Placement, TierPlacement, place
from moesys.planning.plan import Goal, InferencePlan, StepMode, make_plan, spend
from moesys.planning.prediction_report import PredictionReport, report_prediction
from moesys.planning.speed import Prediction

__all__ = [
    "Activity",
    "Budget",
    "Footprint",
    "Goal",
    "InferencePlan",
    "MachineProfile",
    "Placement",
    "Prediction",
    "PredictionReport",
    "StepMode",
    "TierPlacement",
    "choose_faster_dtype",
    "compute_kv_bytes_per_token",
    "compute_state_bytes",
    "find_profile",
    "find_profile_path",
    "make_activity",
    "make_plan",
    "measure_gemm_rate",
    "measure_memory_read_rate",
    "parse_budget",
    "place",
    "read_device_bytes",
    "read_disk",
    "read_free_ram_bytes",
    "read_machine",
    "read_profiles",
    "read_ram_bytes",
    "report_prediction",
    "spend",
]
