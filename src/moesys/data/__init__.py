"""From text to batches: corpora, the tokenizer, packed token files, resumable loaders, held-out windows."""

from moesys.data.batch import IGNORED_TARGET, Batch
from moesys.data.chat_template import ChatTemplate, ChatTemplates
from moesys.data.content_guard import ContentGuard
from moesys.data.conversation import Conversation
from moesys.data.corpus import Document, load_documents, split_heldout
from moesys.data.heldout import HeldoutSet, heldout_windows
from moesys.data.loader import SequenceLoader
from moesys.data.packed_source import pack_source
from moesys.data.packing import PackedTokens, pack_documents
from moesys.data.prepare import PreparedData, load_tokenizer, prepare_data
from moesys.data.tokenizer import Tokenizer, train_tokenizer
from moesys.data.tokenizer_config import TokenizerConfig

__all__ = [
    "IGNORED_TARGET",
    "Batch",
    "ChatTemplate",
    "ChatTemplates",
    "ContentGuard",
    "Conversation",
    "Document",
    "HeldoutSet",
    "PackedTokens",
    "PreparedData",
    "SequenceLoader",
    "Tokenizer",
    "TokenizerConfig",
    "heldout_windows",
    "load_documents",
    "load_tokenizer",
    "pack_documents",
    "pack_source",
    "prepare_data",
    "split_heldout",
    "train_tokenizer",
]
