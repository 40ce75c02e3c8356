"""Documents as one memory-mapped stream of tokens on disk.

The stream of texts is ``[end] document [end] document … [end]``: every token's target is the next one, the target of a
document's last token is the end of text that opens the next document, and nothing is ever padded. Other streams say
which tokens are targets. Knows nothing of batches or ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from moesys.data.cache import hash_parts, open_or_build
from moesys.data.sources import Document
from moesys.data.tokenizer import Tokenizer
from moesys.errors import DataError

PACKING_VERSION = 1
TARGETS_FILE = "is_target.npy"
_BATCH_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class PackedTokens:
    """A tokenised corpus. `N` documents in `T` tokens."""

    tokens: np.ndarray
    """Memory-mapped uint16 (vocabularies up to 65536) or uint32, ``[T]``, read-only."""
    document_starts: np.ndarray
    """int64 ``[N + 1]``: where each document's end-of-text token lies; the last entry is the closing one."""
    document_bytes: np.ndarray
    """int64 ``[N]``: UTF-8 bytes of each document."""
    names: tuple[str, ...]
    """Where each document came from, for people."""
    end_of_text_id: int
    """The token that opens every text and closes the stream."""
    is_target: np.ndarray | None = None
    """bool ``[T]``: which tokens are to be predicted; None where all are."""
    num_truncated: int = 0
    """Documents of which the end is left out."""
    num_dropped: int = 0
    """Documents that are left out."""

    @property
    def num_documents(self) -> int:
        return len(self.document_bytes)

    @property
    def num_tokens(self) -> int:
        """All tokens, the closing end of text included; one less than this have a target."""
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        return int(self.document_bytes.sum())

    @property
    def num_targets(self) -> int:
        """Tokens that are to be predicted; every text's opening token counts."""
        return self.num_tokens if self.is_target is None else int(self.is_target.sum())

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> Self:
        """Maps a folder written by `pack_documents`.

        Sizes are always checked; `verify` also reads all tokens, compares their SHA-256, and sees that every
        document starts at an end of text.

        Raises:
            DataError: a file is missing, truncated or damaged.
        """
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            starts = np.load(folder / "document_starts.npy", allow_pickle=False)
            dtype = np.dtype(index["dtype"])
            expected, actual = int(starts[-1] + 1) * dtype.itemsize, (folder / "tokens.bin").stat().st_size
            if index["format_version"] != PACKING_VERSION:
                raise ValueError(f"format version {index['format_version']}, expected {PACKING_VERSION}")
            if actual != expected:
                raise ValueError(f"tokens.bin has {actual} bytes, expected {expected}")
            if verify and _hash_file(folder / "tokens.bin") != index["tokens_sha256"]:
                raise ValueError("the SHA-256 of tokens.bin differs from the index")
            if len(index["document_bytes"]) != len(starts) - 1:
                raise ValueError(f"{len(index['document_bytes'])} documents, expected {len(starts) - 1}")
            tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")
            is_target = None
            if index.get("has_targets", False):
                is_target = np.load(folder / TARGETS_FILE, mmap_mode="r", allow_pickle=False)
                if is_target.shape != tokens.shape or is_target.dtype != np.bool_:
                    raise ValueError(f"{TARGETS_FILE} does not fit tokens.bin")
            elif verify and not _starts_at(tokens, starts, index["end_of_text_id"]):
                raise ValueError("document_starts.npy does not fit tokens.bin")
            return cls(
                tokens=tokens,
                document_starts=starts,
                document_bytes=np.array(index["document_bytes"], dtype=np.int64),
                names=tuple(index["names"]),
                end_of_text_id=index["end_of_text_id"],
                is_target=is_target,
                num_truncated=index.get("num_truncated", 0),
                num_dropped=index.get("num_dropped", 0),
            )
        except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"{folder}: the packed corpus is damaged ({error}); delete the folder") from error


def pack_documents(documents: Sequence[Document], tokenizer: Tokenizer, cache_dir: Path) -> PackedTokens:
    """Tokenises documents into `cache_dir`, or opens what an earlier call wrote for the same content.

    What lies there is verified, as the texts were just read anyway; a damaged entry is rebuilt with a warning on
    the log.
    """
    folder = cache_dir / hash_parts(
        PACKING_VERSION,
        tokenizer.fingerprint,
        *(part for d in documents for part in (d.name, d.content_hash)),
    )
    return open_or_build(
        folder,
        lambda entry: PackedTokens.open(entry, verify=True),
        lambda entry: _write_packed(documents, tokenizer, entry),
    )


def _write_packed(documents: Sequence[Document], tokenizer: Tokenizer, folder: Path) -> None:
    dtype = choose_token_dtype(tokenizer)
    end_of_text = np.array([tokenizer.end_of_text_id], dtype=dtype)
    digest = hashlib.sha256()
    starts = [0]
    with (folder / "tokens.bin").open("wb") as file:

        def append(tokens: np.ndarray) -> None:
            content = tokens.tobytes()
            digest.update(content)
            file.write(content)

        for texts in _group_texts(document.text for document in documents):
            for token_ids in tokenizer.encode_batch(texts):
                append(end_of_text)
                append(np.array(token_ids, dtype=dtype))
                starts.append(starts[-1] + 1 + len(token_ids))
        append(end_of_text)
    np.save(folder / "document_starts.npy", np.array(starts, dtype=np.int64), allow_pickle=False)
    index = {
        "format_version": PACKING_VERSION,
        "dtype": dtype.str,
        "end_of_text_id": tokenizer.end_of_text_id,
        "tokens_sha256": digest.hexdigest(),
        "document_bytes": [len(document.text.encode()) for document in documents],
        "names": [document.name for document in documents],
    }
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def choose_token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Returns the smaller integer that holds every token."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")


def _group_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups texts so that one group is enough for all cores and its encodings still fit in memory."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _starts_at(tokens: np.ndarray, starts: np.ndarray, end_of_text_id: int) -> bool:
    return bool(starts[0] == 0 and (np.diff(starts) > 0).all() and (tokens[starts] == end_of_text_id).all())


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
