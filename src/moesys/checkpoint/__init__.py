"""Bytes that must survive: training checkpoints with verified manifests, and Hugging Face model folders."""

from moesys.checkpoint.convert import ConvertedModel, convert_model
from moesys.checkpoint.expert_sections import ExpertSections, list_banks
from moesys.checkpoint.files import FileSystem, WrittenFile, replace_file, write_text_atomic
from moesys.checkpoint.hub import ModelSource, resolve_model
from moesys.checkpoint.inventory import read_inventory
from moesys.checkpoint.inventory_records import Inventory, LayerExperts, ModelInventory, PartSize
from moesys.checkpoint.layout import FolderLayout, read_layout
from moesys.checkpoint.load import load_model
from moesys.checkpoint.model_card import CurvePoint, ModelCard
from moesys.checkpoint.model_writer import ExportedWeights, save_model
from moesys.checkpoint.new_folder import require_new_folder, write_new_folder
from moesys.checkpoint.nonfinite import NonFinite, WeightCheck
from moesys.checkpoint.offloaded import OffloadedWeights, open_weights
from moesys.checkpoint.packed_form import PackedForm, quantize_modules
from moesys.checkpoint.packing import PackedModel, pack_model
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
from moesys.checkpoint.storage_form import AS_PUBLISHED, StorageForm
from moesys.checkpoint.text_model import TextModel, TextTools, load_text_model, parse_dtype, read_text_tools
from moesys.checkpoint.verification import Verification, verify_export
from moesys.checkpoint.weight_check import check_weights

__all__ = [
    "AS_PUBLISHED",
    "ConvertedModel",
    "CurvePoint",
    "ExpertSections",
    "ExportedWeights",
    "FileSystem",
    "FolderLayout",
    "Inventory",
    "LayerExperts",
    "ModelCard",
    "ModelInventory",
    "ModelSource",
    "NonFinite",
    "OffloadedWeights",
    "PackedForm",
    "PackedModel",
    "Part",
    "PartSize",
    "RunState",
    "Selection",
    "StorageForm",
    "TextModel",
    "TextTools",
    "Verification",
    "WeightCheck",
    "WrittenFile",
    "check_weights",
    "convert_model",
    "describe_config_difference",
    "list_banks",
    "list_checkpoints",
    "load_model",
    "load_newest_checkpoint",
    "load_text_model",
    "open_weights",
    "pack_model",
    "parse_dtype",
    "quantize_modules",
    "read_inventory",
    "read_layout",
    "read_text_tools",
    "replace_file",
    "require_new_folder",
    "resolve_model",
    "save_checkpoint",
    "save_model",
    "verify_checkpoint",
    "verify_export",
    "write_new_folder",
    "write_text_atomic",
]
