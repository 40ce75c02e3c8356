"""Whether all weights of a checkpoint can be read and are numbers, whichever kind of checkpoint it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moesys.checkpoint.nonfinite import WeightCheck, check_folder
from moesys.checkpoint.packed_check import check_packed
from moesys.checkpoint.packed_file import is_packed_path


def check_weights(
    path: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> WeightCheck:
    """Reads every weight of a model folder or packed file and counts what is NaN or Inf; see `check_folder` and
    `check_packed`. ``on_progress`` gets (bytes read, all bytes)."""
    return check_packed(path, on_progress) if is_packed_path(path) else check_folder(path, on_progress)
