"""The one engine: steps over sequences with a KV cache, sampling, and text around it."""

from moesys.inference.chat import ChatSession
from moesys.inference.chat_format import ChatFormat
from moesys.inference.engine import Engine, SequenceStep
from moesys.inference.generate import Generation, GenerationStats, Stop, generate
from moesys.inference.offload import OffloadedModel, load_offloaded
from moesys.inference.open_model import OpenModel, open_model
from moesys.inference.sampling import SamplingParams
from moesys.inference.text import TextStream

__all__ = [
    "ChatFormat",
    "ChatSession",
    "Engine",
    "Generation",
    "GenerationStats",
    "OffloadedModel",
    "OpenModel",
    "SamplingParams",
    "SequenceStep",
    "Stop",
    "TextStream",
    "generate",
    "load_offloaded",
    "open_model",
]
