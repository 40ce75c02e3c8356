"""Bytes that must survive: training checkpoints with verified manifests, and Hugging Face model folders."""

from moesys.checkpoint.files import FileSystem, WrittenFile, replace_file, write_text_atomic
from moesys.checkpoint.hf import ExportedWeights, load_model, save_model
from moesys.checkpoint.inventory import Inventory, LayerExperts, ModelInventory, PartSize, read_inventory
from moesys.checkpoint.model_card import CurvePoint, ModelCard
from moesys.checkpoint.nonfinite import NonFinite, WeightCheck, check_weights
from moesys.checkpoint.offloaded import OffloadedWeights, open_offloaded
from moesys.checkpoint.parts import Part
from moesys.checkpoint.run_checkpoint import (
    RunState,
    describe_config_difference,
    list_checkpoints,
    load_newest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from moesys.checkpoint.safetensors_file import Selection
from moesys.checkpoint.text_model import TextModel, load_text_model, parse_dtype

__all__ = [
    "CurvePoint",
    "ExportedWeights",
    "FileSystem",
    "Inventory",
    "LayerExperts",
    "ModelCard",
    "ModelInventory",
    "NonFinite",
    "OffloadedWeights",
    "Part",
    "PartSize",
    "RunState",
    "Selection",
    "TextModel",
    "WeightCheck",
    "WrittenFile",
    "check_weights",
    "describe_config_difference",
    "list_checkpoints",
    "load_model",
    "load_newest_checkpoint",
    "load_text_model",
    "open_offloaded",
    "parse_dtype",
    "read_inventory",
    "replace_file",
    "save_checkpoint",
    "save_model",
    "verify_checkpoint",
    "write_text_atomic",
]
