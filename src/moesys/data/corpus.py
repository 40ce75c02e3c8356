"""A corpus is a list of documents in the order of their content hashes.

The order, and the split into training and held-out documents, depend on the texts alone: not on file names,
folder order or the machine, and adding a document moves no other one. Knows nothing of tokens.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from moesys.config.formats import RECORD_SUFFIXES
from moesys.data.sources import (
    Document,
    decode_utf8,
    read_bytes,
    read_hugging_face,
    read_jsonl,
    read_parquet,
    read_text,
)
from moesys.errors import DataError

Format = Literal["auto", "text", "jsonl", "parquet"]


class _Hashed(Protocol):
    @property
    def content_hash(self) -> str: ...


Hashed = TypeVar("Hashed", bound=_Hashed)

_logger = logging.getLogger(__name__)

_TEXT_SUFFIXES = (
    *(".txt", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv", ".json"),
    *(".toml", ".yaml", ".yml", ".ini", ".cfg", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu"),
    *(".rs", ".go", ".java", ".kt", ".scala", ".swift", ".cs", ".js", ".ts", ".jsx", ".tsx", ".css"),
    *(".rb", ".pl", ".php", ".lua", ".jl", ".r", ".hs", ".ml", ".sh", ".sql"),
)
_SUFFIXES = {"text": _TEXT_SUFFIXES, **RECORD_SUFFIXES}

_STDLIB_SUFFIXES = (".py", ".txt", ".rst")
_STDLIB_EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)
# Generated code pages: a megabyte of tables that differ in a few entries.
_STDLIB_EXCLUDED_ENCODINGS = (
    *("cp*", "iso8859_*", "mac_*", "koi8_*"),
    *("kz1048*", "hp_roman8*", "palmos*", "ptcp154*", "tis_620*"),
)


def load_documents(source: str, format: Format = "auto", text_field: str = "text") -> list[Document]:
    """Returns the non-empty documents of a source, ordered by content hash.

    Args:
        source: ``stdlib`` (the running Python's own source and documentation, each text once), a file, a
            folder (read recursively, without hidden files and folders), or ``hf:NAME`` or ``hf:NAME:CONFIG``.
        format: how files are read; ``auto`` goes by the file name's ending. In a folder, ``jsonl`` and
            ``parquet`` take the files with that ending, ``text`` every file that is UTF-8 text; one
            warning on the log counts the files that are not.
        text_field: the field that holds the text, for JSONL, Parquet and Hugging Face datasets.

    Raises:
        DataError: the source is missing, empty, unreadable, or not UTF-8 text.
        MissingExtraError: the source needs a package of the extra ``data``.
    """
    if source == "stdlib":
        found = _read_stdlib(Path(sysconfig.get_path("stdlib")))
    elif source.startswith("hf:"):
        found = read_hugging_face(source.removeprefix("hf:"), text_field)
    else:
        path = find_source(source)
        found = (
            _read_folder(path, format, text_field) if path.is_dir() else _read_file(path, format, text_field)
        )
    documents = sorted((d for d in found if d.text), key=lambda d: (d.content_hash, d.name))
    if not documents:
        raise DataError(
            f"{source}: no documents with text were found (data.format={format} goes by the files' endings "
            "in a folder); give a source that holds text, or set data.format=text to read every text file"
        )
    return documents


def find_source(source: str) -> Path:
    """Returns the file or folder of a source; raises `DataError` where there is none."""
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"{source}: there is no such file or folder (looked in {Path.cwd()}); "
            "set data.source to a file, a folder, hf:NAME or stdlib"
        )
    return path


def split_heldout(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Splits documents into (training, held out), both non-empty and in the order given.

    A document is held out when its content hash, read as a number in [0, 1), is below `fraction`: identical
    texts land on the same side, and other documents do not matter, except that the lowest (highest) hash
    changes sides where its own side would take everything.

    A corpus of one document (or of copies of one) is cut instead: its tail, `fraction` of its characters, is
    held out. The cut moves to the nearest line boundary unless that changes a side by more than half.

    Raises:
        DataError: there is nothing to cut: no document, or a single one of one character.
    """
    if len({document.content_hash for document in documents}) < 2:
        return _cut_tails(documents, fraction)
    return split_by_hash(documents, fraction)


def split_by_hash(items: Sequence[Hashed], fraction: float) -> tuple[list[Hashed], list[Hashed]]:
    """Splits whatever has at least two different content hashes as `split_heldout` does."""
    hashes = sorted({item.content_hash for item in items})
    num_heldout = sum(int(content_hash, 16) < fraction * 2**256 for content_hash in hashes)
    last_heldout = hashes[min(max(num_heldout, 1), len(hashes) - 1) - 1]
    train = [item for item in items if item.content_hash > last_heldout]
    heldout = [item for item in items if item.content_hash <= last_heldout]
    return train, heldout


def _cut_tails(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    num_characters = max((len(document.text) for document in documents), default=0)
    if num_characters < 2:
        raise DataError(
            f"held-out text needs a corpus of at least 2 characters, got {num_characters}; "
            "give a longer document, or more of them"
        )
    train, heldout = [], []
    for document in documents:
        cut = _choose_cut(document.text, fraction)
        train.append(Document(f"{document.name}[:{cut}]", document.text[:cut]))
        heldout.append(Document(f"{document.name}[{cut}:]", document.text[cut:]))
    return train, heldout


def _choose_cut(text: str, fraction: float) -> int:
    """Returns where the tail begins: at a line near the exact place, or there."""
    exact = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    farthest = min(exact, len(text) - exact) / 2
    line_starts = (text.rfind("\n", 0, exact) + 1, text.find("\n", exact) + 1)
    nearest = min(line_starts, key=lambda start: abs(start - exact))
    return nearest if abs(nearest - exact) <= farthest else exact


def _read_file(path: Path, format: Format, text_field: str, name: str | None = None) -> Iterator[Document]:
    name = name or path.name
    kind = _kind_of(path) or "text" if format == "auto" else format
    if kind == "jsonl":
        return read_jsonl(path, name, text_field)
    if kind == "parquet":
        return read_parquet(path, name, text_field)
    return read_text(path, name)


def _read_folder(root: Path, format: Format, text_field: str) -> Iterator[Document]:
    skipped: list[str] = []
    for path in walk_files(root):
        kind, name = _kind_of(path), path.relative_to(root).as_posix()
        if kind == format or (format == "auto" and kind):
            yield from _read_file(path, format, text_field, name)
        elif format == "text" and _is_text(path):
            yield from read_text(path, name)
        elif format == "text":
            skipped.append(name)
    if skipped:
        _logger.warning(
            "%s: skipped files that are not UTF-8 text: %d, the first is %s",
            root,
            len(skipped),
            skipped[0],
        )


def _read_stdlib(root: Path) -> Iterator[Document]:
    seen: set[str] = set()
    for path in walk_files(root, _STDLIB_EXCLUDED_FOLDERS):
        is_code_page = path.parent.name == "encodings" and any(
            fnmatch.fnmatch(path.name, pattern) for pattern in _STDLIB_EXCLUDED_ENCODINGS
        )
        if path.suffix not in _STDLIB_SUFFIXES or is_code_page:
            continue
        for document in read_text(path, path.relative_to(root).as_posix()):
            if document.content_hash not in seen:
                seen.add(document.content_hash)
                yield document


def walk_files(root: Path, excluded_folders: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yields files in sorted order, without hidden ones; a folder that cannot be listed is an error."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: the folder cannot be listed ({error.strerror}); "
            "make it readable for this user, or give a source without it"
        ) from error

    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(s for s in subfolders if s not in excluded_folders and not s.startswith("."))
        yield from (Path(folder, file) for file in sorted(files) if not file.startswith("."))


def _kind_of(path: Path) -> str | None:
    return next((kind for kind, suffixes in _SUFFIXES.items() if path.suffix.lower() in suffixes), None)


def _is_text(path: Path) -> bool:
    content = read_bytes(path)
    try:
        decode_utf8(content, path)
    except DataError:
        return False
    return True
