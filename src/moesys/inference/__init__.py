"""The one engine: steps over sequences with a KV cache, sampling, and text around it."""

from moesys.inference.batch import BatchPrompt, BatchResult, BatchRun, BatchStats
from moesys.inference.chat import ChatSession
from moesys.inference.chat_format import ChatFormat
from moesys.inference.engine import Engine, SequenceStep
from moesys.inference.generate import Generation, GenerationStats, Stop, generate
from moesys.inference.offload import OffloadedModel, Watch, load_offloaded
from moesys.inference.offload_plan import OffloadRequest
from moesys.inference.open_model import OpenModel, load, open_model
from moesys.inference.packed_copy import find_packed_copy
from moesys.inference.run_report import RunMeter, RunReport
from moesys.inference.sampling import SamplingParams
from moesys.inference.text import TextStream
from moesys.inference.timeline import draw_timeline, require_drawing
from moesys.inference.trace import Trace
from moesys.inference.verify import EqualityCheck, verify_model

__all__ = [
    "BatchPrompt",
    "BatchResult",
    "BatchRun",
    "BatchStats",
    "ChatFormat",
    "ChatSession",
    "Engine",
    "EqualityCheck",
    "Generation",
    "GenerationStats",
    "OffloadRequest",
    "OffloadedModel",
    "OpenModel",
    "RunMeter",
    "RunReport",
    "SamplingParams",
    "SequenceStep",
    "Stop",
    "TextStream",
    "Trace",
    "Watch",
    "draw_timeline",
    "find_packed_copy",
    "generate",
    "load",
    "load_offloaded",
    "open_model",
    "require_drawing",
    "verify_model",
]
