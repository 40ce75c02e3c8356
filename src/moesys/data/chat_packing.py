"""Conversations as a packed stream of tokens in which only answers are targets.

For training, the stream is cut into rows of one sequence's length, and a conversation lies in one row as a whole: none
is torn apart, and what no conversation fills is padding without targets. The idea is best fit: the longest first, each
into the fullest row that still takes it. Knows nothing of templates.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from moesys.data.answers import TokenizedConversation
from moesys.data.cache import hash_parts, open_or_build
from moesys.data.conversation import Conversation
from moesys.data.packing import PACKING_VERSION, TARGETS_FILE, PackedTokens, choose_token_dtype
from moesys.data.tokenizer import Tokenizer
from moesys.errors import DataError

Overlong = Literal["error", "drop", "truncate"]

CHAT_PACKING_VERSION = 1


@dataclass(frozen=True)
class RowLayout:
    """How a stream is cut.

    sequence_length:  tokens of a row; None puts conversations one after the other, of any length.
    overlong:         what becomes of a conversation that is longer than a row.
    """

    sequence_length: int | None
    overlong: Overlong = "error"


def pack_conversations(
    conversations: Sequence[Conversation],
    tokenize: Callable[[Conversation], TokenizedConversation],
    tokenizer: Tokenizer,
    layout: RowLayout,
    cache_dir: Path,
    key: str,
) -> PackedTokens:
    """Tokenises conversations into ``cache_dir``, or opens what an earlier call wrote for the same content.

    key: names whatever ``tokenize`` depends on beside the conversation.

    Raises `DataError` or `ModelFormatError` for a conversation that cannot be tokenised, and `DataError` where some are
    too long, or none is left.
    """
    folder = cache_dir / hash_parts(
        PACKING_VERSION,
        CHAT_PACKING_VERSION,
        key,
        layout,
        *(part for c in conversations for part in (c.name, c.content_hash)),
    )
    return open_or_build(
        folder,
        lambda entry: PackedTokens.open(entry, verify=True),
        lambda entry: _write(conversations, tokenize, tokenizer, layout, entry),
    )


def _write(
    conversations: Sequence[Conversation],
    tokenize: Callable[[Conversation], TokenizedConversation],
    tokenizer: Tokenizer,
    layout: RowLayout,
    folder: Path,
) -> None:
    tokenized = [tokenize(conversation) for conversation in conversations]
    kept, num_truncated = _fit(tokenized, layout)
    if not kept:
        raise DataError(
            f"no conversation is left: all {len(tokenized)} have no answer within data.sequence_length "
            f"({layout.sequence_length}); raise it"
        )
    rows = [kept] if layout.sequence_length is None else _fill_rows(kept, layout.sequence_length)
    token_ids: list[int] = []
    is_target: list[bool] = []
    starts: list[int] = []
    for number, row in enumerate(rows, start=1):
        for conversation in row:
            starts.append(len(token_ids))
            token_ids += conversation.token_ids
            is_target += conversation.is_target
        num_padding = (
            0 if layout.sequence_length is None else number * layout.sequence_length - len(token_ids)
        )
        token_ids += [tokenizer.end_of_text_id] * num_padding
        is_target += [False] * num_padding
    token_ids.append(tokenizer.end_of_text_id)
    is_target.append(False)
    placed = [conversation for row in rows for conversation in row]
    _write_files(
        folder,
        np.array(token_ids, dtype=choose_token_dtype(tokenizer)),
        np.array(is_target),
        np.array([*starts, len(token_ids) - 1], dtype=np.int64),
        {
            "end_of_text_id": tokenizer.end_of_text_id,
            "document_bytes": [conversation.num_answer_bytes for conversation in placed],
            "names": [conversation.name for conversation in placed],
            "num_truncated": num_truncated,
            "num_dropped": len(tokenized) - len(placed),
        },
    )


def _fit(
    tokenized: Sequence[TokenizedConversation], layout: RowLayout
) -> tuple[list[TokenizedConversation], int]:
    """Returns what fits into rows, and how many were cut for it; what is cut before its first answer is dropped."""
    length = layout.sequence_length
    if length is None:
        return list(tokenized), 0
    overlong = [conversation for conversation in tokenized if len(conversation.token_ids) > length]
    if overlong and layout.overlong == "error":
        longest = max(overlong, key=lambda conversation: len(conversation.token_ids))
        raise DataError(
            f"{len(overlong)} of {len(tokenized)} conversations are longer than data.sequence_length ({length}); the "
            f"first is {overlong[0].name}, the longest has {len(longest.token_ids)} tokens; raise "
            "data.sequence_length, or set data.overlong to drop or truncate"
        )
    kept = [conversation for conversation in tokenized if len(conversation.token_ids) <= length]
    if layout.overlong == "drop":
        return kept, 0
    cut = [_truncate(conversation, length) for conversation in overlong]
    cut = [conversation for conversation in cut if any(conversation.is_target)]
    return kept + cut, len(cut)


def _truncate(conversation: TokenizedConversation, length: int) -> TokenizedConversation:
    """Cuts the end off; the bytes of the answers shrink with their tokens."""
    share = sum(conversation.is_target[:length]) / sum(conversation.is_target)
    return replace(
        conversation,
        token_ids=conversation.token_ids[:length],
        is_target=conversation.is_target[:length],
        num_answer_bytes=round(conversation.num_answer_bytes * share),
    )


def _fill_rows(
    conversations: Sequence[TokenizedConversation], length: int
) -> list[list[TokenizedConversation]]:
    rows: list[list[TokenizedConversation]] = []
    spaces: list[tuple[int, int]] = []
    """(tokens that are free, row) of each row, ascending."""
    for conversation in sorted(conversations, key=lambda c: -len(c.token_ids)):
        needed = len(conversation.token_ids)
        place = bisect.bisect_left(spaces, (needed, -1))
        if place == len(spaces):
            rows.append([])
            free, row = length, len(rows) - 1
        else:
            free, row = spaces.pop(place)
        rows[row].append(conversation)
        bisect.insort(spaces, (free - needed, row))
    return rows


def _write_files(
    folder: Path, tokens: np.ndarray, is_target: np.ndarray, starts: np.ndarray, index: dict[str, object]
) -> None:
    (folder / "tokens.bin").write_bytes(tokens.tobytes())
    np.save(folder / TARGETS_FILE, is_target, allow_pickle=False)
    np.save(folder / "document_starts.npy", starts, allow_pickle=False)
    facts = {
        "format_version": PACKING_VERSION,
        "dtype": tokens.dtype.str,
        "tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "has_targets": True,
    }
    (folder / "index.json").write_text(json.dumps(facts | index), encoding="utf-8")
