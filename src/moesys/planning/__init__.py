"""What this machine can do, measured, and what of a model fits where: the numbers that plans are made from."""

from moesys.planning.budget import Budget, parse_budget
from moesys.planning.ceilings import choose_faster_dtype, measure_gemm_rate, measure_memory_read_rate
from moesys.planning.footprint import Footprint, compute_kv_bytes_per_token
from moesys.planning.machine import read_device_bytes, read_ram_bytes
from moesys.planning.placement import Placement, TierPlacement, place

__all__ = [
    "Budget",
    "Footprint",
    "Placement",
    "TierPlacement",
    "choose_faster_dtype",
    "compute_kv_bytes_per_token",
    "measure_gemm_rate",
    "measure_memory_read_rate",
    "parse_budget",
    "place",
    "read_device_bytes",
    "read_ram_bytes",
]
