"""From a growing list of tokens to text that can be shown: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 8


class TextStream:
    """Turns tokens into pieces of text as they come.

    Holds back bytes of an unfinished character, and text that may turn out to begin a stop string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop_strings = [stop for stop in stop_strings if stop]
        self._token_ids: list[int] = []
        self._shown_tokens = 0
        self._held = ""
        self.is_stopped = False
        """Whether a stop string was met; set by `push`."""

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that is now certain."""
        self._token_ids.append(token_id)
        fresh = self._decode_fresh(is_final=False)
        return self._release(fresh, is_final=False)

    def finish(self) -> str:
        """Returns what was held back."""
        return self._release(self._decode_fresh(is_final=True), is_final=True)

    def _decode_fresh(self, *, is_final: bool) -> str:
        """Decodes the tokens not yet shown, with some before them, since a decoder may join neighbours."""
        start = max(0, self._shown_tokens - _CONTEXT_TOKENS)
        before = self._decode(self._token_ids[start : self._shown_tokens])
        text = self._decode(self._token_ids[start:])
        if not is_final and text.endswith(_REPLACEMENT) and len(self._token_ids) - self._shown_tokens < 4:
            return ""
        self._shown_tokens = len(self._token_ids)
        return text[len(before) :]

    def _release(self, fresh: str, *, is_final: bool) -> str:
        if self.is_stopped:
            return ""
        text, self._held = self._held + fresh, ""
        ends = [position for stop in self._stop_strings if (position := text.find(stop)) >= 0]
        if ends:
            self.is_stopped = True
            return text[: min(ends)]
        held = 0 if is_final else self._count_possible_stop(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _count_possible_stop(self, text: str) -> int:
        """Returns the length of the longest end of ``text`` that begins a stop string."""
        lengths = (
            length
            for stop in self._stop_strings
            for length in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:length])
        )
        return max(lengths, default=0)
