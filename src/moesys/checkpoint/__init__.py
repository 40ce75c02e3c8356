"""Bytes that must survive: training checkpoints with verified manifests, and Hugging Face model folders."""

from moesys.checkpoint.files import FileSystem, write_text_atomic
from moesys.checkpoint.run_checkpoint import (
    RunState,
    describe_config_difference,
    list_checkpoints,
    load_newest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)

__all__ = [
    "FileSystem",
    "RunState",
    "describe_config_difference",
    "list_checkpoints",
    "load_newest_checkpoint",
    "save_checkpoint",
    "verify_checkpoint",
    "write_text_atomic",
]
