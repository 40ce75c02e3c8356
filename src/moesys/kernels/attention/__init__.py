"""Attention of few new tokens over cached keys and values that lie in pages."""

from moesys.kernels.attention.api import attend_pages, reads_in_place
from moesys.kernels.attention.page_table import PageTable

__all__ = ["PageTable", "attend_pages", "reads_in_place"]
