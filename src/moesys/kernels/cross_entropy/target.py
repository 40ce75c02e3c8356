"""The one target id that every implementation of the loss, and every batch, means nothing by."""

from __future__ import annotations

IGNORED_TARGET = -100
"""The target of a position that is not scored: it contributes neither loss nor gradient."""
