"""How much a token sees of its sequence, on average."""

from __future__ import annotations


def compute_mean_visible_keys(sliding_window: int | None, context: int) -> float:
    """How many keys a query sees, itself included, averaged over the ``context`` positions of a sequence.

    With a window of w <= context that is the mean of min(i + 1, w) over positions i; without, (context + 1) / 2.
    """
    window = context if sliding_window is None else min(sliding_window, context)
    return window - window * (window - 1) / (2 * context)
