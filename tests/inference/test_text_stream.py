"""Streamed pieces are the text, whatever the tokens; nothing after a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_decoders import make_llama_like_tokenizer, make_tokenizer

from moesys.errors import GenerationError
from moesys.inference import TextStream

TEXTS = st.text(max_size=20) | st.text(
    alphabet="a日🙂\N{REPLACEMENT CHARACTER}\N{COMBINING ACUTE ACCENT}", max_size=12
)


class Chunks:
    """A tokenizer whose tokens are any pieces of bytes."""

    def __init__(self, contents: bytes, cuts: Sequence[int]) -> None:
        edges = [0, *sorted({cut % (len(contents) + 1) for cut in cuts}), len(contents)]
        self.pieces = [contents[a:b] for a, b in pairwise(edges)]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def stream(self, stops: Sequence[str] = ()) -> tuple[list[str], bool]:
        stream, shown = TextStream(self.decode, stops), []
        for i in range(len(self.pieces)):
            shown.append(stream.push(i))
            if stream.is_stopped:
                break
        return [*shown, stream.finish()], stream.is_stopped


@given(TEXTS, st.lists(st.integers(0, 80), max_size=40))
def test_pieces_are_the_text_for_any_cut_into_tokens(text: str, cuts: list[int]) -> None:
    assert "".join(Chunks(text.encode(), cuts).stream()[0]) == text


@given(st.binary(max_size=24))
def test_bytes_that_are_no_text_come_as_they_are_decoded(contents: bytes) -> None:
    pieces, _ = Chunks(contents, range(1, 30)).stream()
    assert "".join(pieces) == contents.decode(errors="replace")


@given(
    st.text(alphabet="ab日🙂", max_size=14),
    st.lists(st.text(alphabet="ab日🙂", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(0, 60), max_size=40),
)
def test_the_text_ends_at_the_stop_string_that_is_complete_first(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    met = min(
        ((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text), default=None
    )
    pieces, is_stopped = Chunks(text.encode(), cuts).stream(stops)
    assert "".join(pieces) == (text if met is None else text[: met[1]])
    assert is_stopped == (met is not None)


def test_characters_appear_as_soon_as_they_are_whole() -> None:
    assert Chunks("a🙂b".encode(), range(1, 6)).stream()[0] == ["a", "", "", "", "🙂", "b", ""]


def test_whole_characters_do_not_wait_for_an_unfinished_one() -> None:
    assert Chunks("ab🙂".encode(), [3]).stream()[0] == ["ab", "🙂", ""]


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    assert Chunks(b"one.\nUsher\nUser: two", range(1, 21)).stream(["\nUser:"])[0] == [
        "o", "n", "e", ".", "", "", "", "\nUsh", "e", "r", "", "", "", "", "", "", ""
    ]  # fmt: skip


def test_held_text_comes_out_at_the_end_and_a_stop_inside_one_piece_cuts_it() -> None:
    assert Chunks(b"hello\nUs", [5]).stream(["\nUser:"]) == (["hello", "", "\nUs"], False)
    assert Chunks(b"yes STOP no", []).stream(["STOP"]) == (["yes ", ""], True)


@pytest.mark.parametrize("cuts", [[], [1, 2, 3]])
def test_of_overlapping_stop_strings_the_first_complete_one_counts(cuts: list[int]) -> None:
    pieces, _ = Chunks(b"xaby", cuts).stream(["aby", "b"])
    assert "".join(pieces) == "xa"


def test_nothing_comes_after_a_stop_even_if_pushed() -> None:
    chunks = Chunks(b"aXbc", [1, 2, 3])
    stream = TextStream(chunks.decode, ["X"])
    assert [stream.push(i) for i in range(4)] == ["a", "", "", ""]
    assert stream.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(GenerationError, match="must not be empty"):
        TextStream(bytes.decode, ["a", ""])


def test_a_byte_level_tokenizer_streams_every_script() -> None:
    tokenizer = make_tokenizer()
    text = "to be 日本語 🙂👩‍👩‍👧 ñandú\r\n"
    stream = TextStream(tokenizer.decode)
    assert "".join(stream.push(i) for i in tokenizer.encode(text)) + stream.finish() == text


@pytest.fixture(scope="module")
def llama_like() -> tokenizers.Tokenizer:
    return make_llama_like_tokenizer()


def test_long_runs_of_byte_tokens_are_streamed(llama_like: tokenizers.Tokenizer) -> None:
    text = "日本語は🙂面白い" * 2
    stream = TextStream(llama_like.decode)
    pieces = [stream.push(1 + byte) for byte in text.encode()]
    assert "".join(pieces) + stream.finish() == text
    assert pieces[2] == "日"


def test_the_space_between_the_prompt_and_the_first_token_is_shown(llama_like: tokenizers.Tokenizer) -> None:
    prompt, new = [llama_like.token_to_id("▁x")], llama_like.token_to_id("▁is")
    assert TextStream(llama_like.decode, (), prompt).push(new) == " is"
    assert TextStream(llama_like.decode).push(new) == "is"


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "x" * len(ids)

    stream = TextStream(decode)
    assert "".join(stream.push(0) for _ in range(100)) == "x" * 100
    assert longest <= 2
