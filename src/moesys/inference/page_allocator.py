"""Which pages a sequence gets: neighbours of those it has, wherever that is possible.

A sequence reserves a home, a range of pages for its full length, and takes pages from it as it grows, so that its
tokens lie in one piece. A reservation is no promise: when nothing else is free, others take pages of a home, from its
end. Plain numbers; knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

_NOBODY = -1


class PageAllocator:
    """Free, reserved and taken pages, numbered from 0."""

    def __init__(self, num_pages: int) -> None:
        self._homes: list[int] = [_NOBODY] * num_pages
        self._is_taken: list[bool] = [False] * num_pages
        self._next_home = 0
        self.num_free = num_pages
        """Pages that nobody has taken, reserved ones included."""

    @property
    def num_pages(self) -> int:
        return len(self._homes)

    def extend(self, num_pages: int) -> None:
        """Adds free pages at the end."""
        self._homes += [_NOBODY] * num_pages
        self._is_taken += [False] * num_pages
        self.num_free += num_pages

    def reserve(self, num_pages: int) -> int:
        """Reserves the smallest range that holds ``num_pages``, else the longest there is; returns the home's id."""
        home, self._next_home = self._next_home, self._next_home + 1
        gaps = self._list_gaps()
        wide_enough = [gap for gap in gaps if len(gap) >= num_pages]
        best = min(wide_enough, key=len) if wide_enough else max(gaps, key=len, default=range(0))
        for page in best[:num_pages]:
            self._homes[page] = home
        return home

    def take(self, home: int) -> int:
        """Takes the first free page of a home, else one that is nobody's, else the last of another's. There must be
        one (`num_free`)."""
        free = [page for page in range(self.num_pages) if not self._is_taken[page]]
        own = next((page for page in free if self._homes[page] == home), None)
        unclaimed = next((page for page in free if self._homes[page] == _NOBODY), None)
        page = own if own is not None else unclaimed if unclaimed is not None else free[-1]
        self._is_taken[page] = True
        self.num_free -= 1
        return page

    def give_back(self, pages: Sequence[int]) -> None:
        """Makes taken pages free again."""
        for page in pages:
            assert self._is_taken[page]
            self._is_taken[page] = False
        self.num_free += len(pages)

    def dissolve(self, home: int) -> None:
        """Ends a reservation."""
        self._homes = [_NOBODY if other == home else other for other in self._homes]

    def _list_gaps(self) -> list[range]:
        """Returns the longest ranges of pages that are neither taken nor reserved."""
        gaps: list[range] = []
        for page in range(self.num_pages):
            if self._is_taken[page] or self._homes[page] != _NOBODY:
                continue
            if gaps and gaps[-1].stop == page:
                gaps[-1] = range(gaps[-1].start, page + 1)
            else:
                gaps.append(range(page, page + 1))
        return gaps
