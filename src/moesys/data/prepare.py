"""From configuration to packed tokens in one call: load, split, tokenizer, pack; cached by content.

Texts and conversations have a walk each; what comes out is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesys.config import DataConfig
from moesys.data.cache import hash_parts, open_or_build
from moesys.data.chat_corpus import load_conversations, split_conversations
from moesys.data.chat_packing import CHAT_PACKING_VERSION
from moesys.data.chat_template import read_template
from moesys.data.corpus import load_documents, split_heldout
from moesys.data.loader import count_sequences
from moesys.data.packed_source import ConversationPacker
from moesys.data.packing import PACKING_VERSION, PackedTokens, pack_documents
from moesys.data.sources import Document
from moesys.data.tokenizer import Tokenizer, train_tokenizer
from moesys.errors import DataError
from moesys.units import format_bytes, format_count

# Part of the cache key; raise it when training gives other tokens for the same text.
_TOKENIZER_VERSION = 1


@dataclass(frozen=True)
class PreparedData:
    """A corpus that is ready to train on and to be evaluated on."""

    tokenizer: Tokenizer
    train: PackedTokens
    heldout: PackedTokens
    description: str
    """One line for people."""
    fingerprint: str
    """SHA-256 over the texts of both sides, the tokenizer and the packing version. Saved with a run: an equal
    one means equal tokens in equal order."""


def prepare_data(config: DataConfig, cache_dir: Path, tokenizer: Tokenizer | None = None) -> PreparedData:
    """Loads, splits, tokenises and packs a corpus; unchanged content is read from `cache_dir`.

    A `tokenizer` that is given, such as the one that a run has saved, is used whatever the config says, with the chat
    templates among its files; else the config's is loaded, or one is trained on the training documents only.

    Raises:
        DataError: the source or the tokenizer cannot be used, or the corpus is too small.
        ModelFormatError: a conversation cannot be written with the chat template.
        MissingExtraError: the source needs a package of the extra ``data``.
    """
    if config.format == "chat":
        return _prepare_chat(config, cache_dir, tokenizer or _load_for_chat(config))
    documents = load_documents(config.source, config.format, config.text_field)
    train_documents, heldout_documents = split_heldout(documents, config.heldout_fraction)
    if tokenizer is None:
        tokenizer = _load_or_train(config, train_documents, cache_dir / "tokenizers")
    train = pack_documents(train_documents, tokenizer, cache_dir / "packed")
    count_sequences(train, config.sequence_length)
    heldout = pack_documents(heldout_documents, tokenizer, cache_dir / "packed")
    return PreparedData(
        tokenizer=tokenizer,
        train=train,
        heldout=heldout,
        description=_describe(config.source, documents, train, heldout),
        fingerprint=hash_parts(
            PACKING_VERSION,
            tokenizer.fingerprint,
            *(document.content_hash for document in train_documents),
            "held out",
            *(document.content_hash for document in heldout_documents),
        ),
    )


def load_tokenizer(config: DataConfig, path: Path) -> Tokenizer:
    """Loads a tokenizer, with the chat template that the config gives in place of its own. Raises `DataError` or
    `ModelFormatError`."""
    tokenizer = Tokenizer.load(path)
    if config.chat_template is None:
        return tokenizer
    return tokenizer.with_chat_template(read_template(Path(config.chat_template).expanduser()))


def _prepare_chat(config: DataConfig, cache_dir: Path, tokenizer: Tokenizer) -> PreparedData:
    conversations = load_conversations(config.source)
    train_side, heldout_side = split_conversations(conversations, config.heldout_fraction)
    packer = ConversationPacker(config, tokenizer, cache_dir / "packed")
    train, heldout = packer.pack_rows(train_side), packer.pack_stream(heldout_side)
    return PreparedData(
        tokenizer=tokenizer,
        train=train,
        heldout=heldout,
        description=_describe_chat(config, train, heldout),
        fingerprint=hash_parts(
            PACKING_VERSION,
            CHAT_PACKING_VERSION,
            packer.fingerprint,
            config.sequence_length,
            config.overlong,
            *(conversation.content_hash for conversation in train_side),
            "held out",
            *(conversation.content_hash for conversation in heldout_side),
        ),
    )


def _load_for_chat(config: DataConfig) -> Tokenizer:
    if config.tokenizer is None:
        raise DataError(
            "data.format=chat needs a tokenizer that knows the turns of a conversation, and none can be trained on "
            "them; set model.init to a model folder, or data.tokenizer to a folder with a chat template"
        )
    return load_tokenizer(config, Path(config.tokenizer).expanduser())


def _describe_chat(config: DataConfig, train: PackedTokens, heldout: PackedTokens) -> str:
    num_conversations = train.num_documents + heldout.num_documents
    lost = [
        f"{number} {word} (longer than {config.sequence_length} tokens)"
        for number, word in ((train.num_truncated, "truncated"), (train.num_dropped, "dropped"))
        if number
    ]
    parts = [
        f"{config.source}: {num_conversations} conversations",
        f"{format_count(train.num_targets + heldout.num_targets)} answer tokens",
        f"{heldout.num_documents} conversations held out",
        *lost,
    ]
    return ", ".join(parts)


def _describe(source: str, documents: list[Document], train: PackedTokens, heldout: PackedTokens) -> str:
    num_bytes, num_tokens = train.num_bytes + heldout.num_bytes, train.num_tokens + heldout.num_tokens
    size = (
        f"{format_bytes(num_bytes)}, {format_count(num_tokens)} tokens "
        f"({num_bytes / num_tokens:.2f} bytes per token)"
    )
    if len({document.content_hash for document in documents}) == 1:
        return (
            f"{source}: {size}, one document: its last {100 * heldout.num_bytes / num_bytes:.2g} % held out"
        )
    return f"{source}: {len(documents)} documents, {size}, {heldout.num_documents} documents held out"


def _load_or_train(config: DataConfig, documents: list[Document], cache_dir: Path) -> Tokenizer:
    if config.tokenizer is not None:
        return load_tokenizer(config, Path(config.tokenizer).expanduser())
    content_hashes = (document.content_hash for document in documents)
    return open_or_build(
        cache_dir / hash_parts(_TOKENIZER_VERSION, config.vocab_size, *content_hashes),
        Tokenizer.load,
        lambda folder: train_tokenizer((d.text for d in documents), config.vocab_size).save(folder),
    )
