"""From a growing list of tokens to text that can be shown: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moesys.errors import GenerationError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into pieces of text as they come.

    Holds back bytes of an unfinished character, and text that may turn out to begin a stop string. Decodes only the
    tokens since the last-but-one place where a token ended a character: a decoder may join neighbours, but only
    across such a place. Of several stop strings the one that is complete first counts, however the text is cut
    into tokens.

    decode:        from tokens to text; unfinished characters at the end become U+FFFD.
    stop_strings:  none may be empty; `GenerationError` otherwise.
    prompt_ids:    tokens of whole text before the first one; some decoders drop the space that begins a text.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop_strings: Sequence[str] = (),
        prompt_ids: Sequence[int] = (),
    ) -> None:
        if not all(stop_strings):
            raise GenerationError("a stop string must not be empty; leave it out")
        self._decode = decode
        self._stop_strings = tuple(stop_strings)
        self._window = list(prompt_ids)
        self._num_whole_tokens = len(self._window)
        self._num_shown_chars = len(decode(self._window))
        self._held = ""
        self.is_stopped = False
        """Whether a stop string was met; set by `push` and `finish`."""

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that is now certain."""
        self._window.append(token_id)
        return self._release(self._decode_fresh(is_final=False), is_final=False)

    def finish(self) -> str:
        """Returns what was held back."""
        return self._release(self._decode_fresh(is_final=True), is_final=True)

    def _decode_fresh(self, *, is_final: bool) -> str:
        """Returns the text of the window that was not shown before, without an unfinished character at its end."""
        text = self._decode(self._window)
        whole = text if is_final else text.rstrip(_REPLACEMENT)
        fresh = whole[self._num_shown_chars :]
        self._num_shown_chars = max(self._num_shown_chars, len(whole))
        if len(whole) == len(text):
            del self._window[: self._num_whole_tokens]
            self._num_whole_tokens = len(self._window)
            self._num_shown_chars = len(self._decode(self._window))
        return fresh

    def _release(self, fresh: str, *, is_final: bool) -> str:
        if self.is_stopped:
            return ""
        text, self._held = self._held + fresh, ""
        met = [(at + len(stop), at) for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if met:
            self.is_stopped = True
            _, start = min(met)
            return text[:start]
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
