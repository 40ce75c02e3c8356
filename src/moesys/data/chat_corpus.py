"""A chat corpus is a list of conversations in the order of their content hashes, each once. Knows nothing of tokens."""

from __future__ import annotations

from pathlib import Path

from moesys.config.formats import RECORD_SUFFIXES
from moesys.data.conversation import Conversation, read_conversations
from moesys.data.corpus import find_source, split_by_hash, walk_files
from moesys.errors import DataError


def load_conversations(source: str) -> list[Conversation]:
    """Returns the conversations of a JSONL file, or of every JSONL file in a folder, ordered by content hash.

    Raises `DataError`, with file and line, for one that cannot be used.
    """
    root = find_source(source)
    found = {
        conversation.content_hash: conversation
        for path in (_list_files(root) if root.is_dir() else [root])
        for conversation in read_conversations(
            path, path.relative_to(root).as_posix() if root.is_dir() else path.name
        )
    }
    if not found:
        raise DataError(f"{source}: there is no conversation; give a JSONL file or a folder of them")
    return [found[content_hash] for content_hash in sorted(found)]


def split_conversations(
    conversations: list[Conversation], fraction: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Splits conversations into (training, held out) by content hash. Raises `DataError` for fewer than two."""
    if len(conversations) < 2:
        raise DataError(
            "a chat corpus needs at least 2 different conversations, one to learn and one to hold out, "
            f"got {len(conversations)}; add some"
        )
    return split_by_hash(conversations, fraction)


def _list_files(root: Path) -> list[Path]:
    return [path for path in walk_files(root) if path.suffix.lower() in RECORD_SUFFIXES["jsonl"]]
