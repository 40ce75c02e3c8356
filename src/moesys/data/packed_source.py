"""From a source to packed tokens, texts and conversations alike; cached by content. Knows no run and no model."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from moesys.config import DataConfig
from moesys.data.answers import AnswerTokenizer
from moesys.data.cache import hash_parts
from moesys.data.chat_corpus import load_conversations, split_conversations
from moesys.data.chat_packing import RowLayout, pack_conversations
from moesys.data.chat_template import ChatTemplates
from moesys.data.conversation import Conversation
from moesys.data.corpus import load_documents, split_heldout
from moesys.data.packing import PackedTokens, pack_documents
from moesys.data.tokenizer import Tokenizer


class ConversationPacker:
    """Packs conversations with a tokenizer and the chat templates among its files."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, cache_dir: Path) -> None:
        place = config.chat_template or config.tokenizer or "the model's tokenizer"
        templates = ChatTemplates.parse(tokenizer.render_files(), place)
        today = config.chat_date or date.today().isoformat()
        self._config = config
        self._tokenizer = tokenizer
        self._answers = AnswerTokenizer(templates, tokenizer, config.chat_answers, today)
        self._cache_dir = cache_dir
        self.fingerprint = hash_parts(
            tokenizer.fingerprint,
            sorted(templates.texts.items()),
            sorted(templates.special_tokens.items()),
            config.chat_answers,
            today,
        )
        """SHA-256 over everything that decides the tokens of a conversation."""

    def pack_rows(self, conversations: list[Conversation]) -> PackedTokens:
        """Packs for training: each conversation whole within one sequence."""
        return self._pack(conversations, RowLayout(self._config.sequence_length, self._config.overlong))

    def pack_stream(self, conversations: list[Conversation]) -> PackedTokens:
        """Packs for evaluation: one after the other, of any length."""
        return self._pack(conversations, RowLayout(None))

    def _pack(self, conversations: list[Conversation], layout: RowLayout) -> PackedTokens:
        return pack_conversations(
            conversations, self._answers.tokenize, self._tokenizer, layout, self._cache_dir, self.fingerprint
        )


def pack_source(
    config: DataConfig, tokenizer: Tokenizer, heldout_fraction: float | None, cache_dir: Path
) -> PackedTokens:
    """Packs the documents or conversations of a source for evaluation.

    heldout_fraction: pack only what training with this fraction holds out; None packs all.

    Raises `DataError`, `ModelFormatError` or `MissingExtraError`.
    """
    if config.format == "chat":
        conversations = load_conversations(config.source)
        if heldout_fraction is not None:
            _, conversations = split_conversations(conversations, heldout_fraction)
        return ConversationPacker(config, tokenizer, cache_dir / "packed").pack_stream(conversations)
    documents = load_documents(config.source, config.format, config.text_field)
    if heldout_fraction is not None:
        _, documents = split_heldout(documents, heldout_fraction)
    return pack_documents(documents, tokenizer, cache_dir / "packed")
