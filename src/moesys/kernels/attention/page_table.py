"""Which tokens each query of an attention over pages may see, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.errors import ShapeError


@dataclass(frozen=True)
class PageTable:
    """The cached tokens of every query: token i of a sequence lies in row page * page_tokens + i % page_tokens of the
    sequence's page i // page_tokens.

    page_tokens:  tokens of a page.
    page_ids:     int64, the pages of all sequences, each sequence's in the order of its tokens. Pages of which a query
                  sees nothing are not looked at.
    starts_T:     (queries,) int64: where in ``page_ids`` the pages of a query's sequence begin.
    stops_T:      (queries,) int64: the position after the query's own, which is the last that it sees.
    """

    page_tokens: int
    page_ids: Tensor
    starts_T: Tensor
    stops_T: Tensor

    def __post_init__(self) -> None:
        if self.page_tokens < 1 or self.starts_T.shape != self.stops_T.shape:
            raise ShapeError(
                f"page_tokens ({self.page_tokens}) must be 1 or more, and starts {tuple(self.starts_T.shape)} as many "
                f"as stops {tuple(self.stops_T.shape)}"
            )
        for ids in (self.page_ids, self.starts_T, self.stops_T):
            if ids.dtype is not torch.int64 or ids.ndim != 1 or not ids.is_contiguous():
                raise ShapeError(
                    f"a page table is contiguous int64 vectors, got {tuple(ids.shape)} {ids.dtype}"
                )

    @classmethod
    def from_lists(
        cls,
        page_tokens: int,
        pages: Sequence[Sequence[int]],
        stops: Sequence[int],
        device: torch.device | None = None,
    ) -> PageTable:
        """Makes the table of one query per sequence: its pages and its stop."""
        starts, end = [], 0
        for own in pages:
            starts.append(end)
            end += len(own)
        numbers = [*(page for own in pages for page in own), *starts, *stops]
        ids = torch.tensor(numbers, dtype=torch.int64, device=device)
        return cls(page_tokens, *ids.split([end, len(starts), len(stops)]))

    @property
    def num_queries(self) -> int:
        return self.stops_T.shape[0]

    def list_rows(self, sliding_window: int | None) -> list[Tensor]:
        """Returns per query the rows that it sees, in order, as int64 indices."""
        rows: list[Tensor] = []
        for start, stop in zip(self.starts_T.tolist(), self.stops_T.tolist(), strict=True):
            first = 0 if sliding_window is None else max(0, stop - sliding_window)
            token = torch.arange(first, stop, device=self.page_ids.device)
            page = self.page_ids[start + token // self.page_tokens]
            rows.append(page * self.page_tokens + token % self.page_tokens)
        return rows
