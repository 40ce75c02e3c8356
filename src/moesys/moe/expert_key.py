"""How the section of an expert is named, wherever experts are moved, counted or guessed."""

from __future__ import annotations

ExpertKey = tuple[int, int]
"""(layer, expert): the key of an expert's section in a cache."""
