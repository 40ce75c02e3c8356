"""The one engine: steps over sequences with a KV cache, sampling, and text around it."""

from moesys.inference.chat import ChatSession
from moesys.inference.chat_format import ChatFormat
from moesys.inference.engine import Engine, SequenceStep
from moesys.inference.generate import Generation, GenerationStats, Stop, generate
from moesys.inference.sampling import SamplingParams
from moesys.inference.text import TextStream

__all__ = [
    "ChatFormat",
    "ChatSession",
    "Engine",
    "Generation",
    "GenerationStats",
    "SamplingParams",
    "SequenceStep",
    "Stop",
    "TextStream",
    "generate",
]
