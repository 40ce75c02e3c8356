"""Ceilings of this machine, measured, so that every speed can be reported as a share of what is possible."""

from moesys.planning.ceilings import choose_faster_dtype, measure_gemm_rate, measure_memory_read_rate

__all__ = ["choose_faster_dtype", "measure_gemm_rate", "measure_memory_read_rate"]
