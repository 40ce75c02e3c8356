"""Whether what came through the two seams was complete: every assignment in a part, every expert in one view.

Asks the device only at the end, and for the assignments only where some are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moesys.errors import ShapeError
from moesys.moe.routing import Routing


def require_all_served(layer_id: int, routing: Routing, num_served: int) -> None:
    """Raises `ShapeError` when the parts of a dispatcher answered another number of assignments than are not dropped:
    missing ones would be silent zeros."""
    num_kept = routing.num_assignments - routing.count_dropped()
    if num_served != num_kept:
        raise ShapeError(
            f"the dispatcher must yield parts that together serve each assignment that is not dropped once; for layer "
            f"{layer_id} they served {num_served} of {num_kept} (Part.num_served)"
        )


def require_each_expert_once(layer_id: int, offsets: Tensor, tables: Sequence[Tensor]) -> None:
    """Raises `ShapeError` when an expert with rows was in no view, so that its rows are missing, or in several, so that
    they were computed more than once.

    offsets:  (experts + 1,) group offsets of the dispatched rows.
    tables:   of each view the (experts,) slot of each expert, -1 for one that it does not hold.
    """
    has_rows_E = offsets.diff() > 0
    num_views_E = offsets.new_zeros(offsets.shape[0] - 1)
    for slot_of_expert in tables:
        num_views_E += slot_of_expert >= 0
    if bool(((num_views_E == 1) | ~has_rows_E).all()):
        return
    missing = (has_rows_E & (num_views_E == 0)).nonzero().flatten().tolist()
    repeated = (has_rows_E & (num_views_E > 1)).nonzero().flatten().tolist()
    raise ShapeError(
        f"the expert source must yield each expert that has rows in exactly one view; for layer {layer_id} experts "
        f"{missing} were in none and experts {repeated} in several"
    )
