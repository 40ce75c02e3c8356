"""The exceptions of moesys. Every message tells the rule, the values that broke it and the fix.

MoesysError
├── ConfigError (ValueError)             a setting that cannot be used
│   ├── UnknownKeyError                  a key that does not exist; names the nearest one
│   └── IneffectiveOptionError           a key that the user set and that would change nothing
├── DataError (ValueError)               a corpus, tokenizer or document that cannot be used
├── ShapeError (ValueError)              tensors or sizes that do not fit together
├── KernelError (ValueError)             a kernel chosen by hand cannot take the call
├── RoutingError (ValueError)            router logits or routing options that cannot be used
├── CheckpointError (RuntimeError)       a checkpoint that cannot be written or read
│   ├── DamagedCheckpointError           contents differ from the manifest's checksums
│   └── DiskSpaceError (OSError)         not enough space; the old checkpoint is untouched
├── SectionReadError (OSError)           weights on the disk cannot be read or differ from their checksum
├── ModelFormatError (ValueError)        a model folder or layout that moesys cannot read or write
├── TrainingError (RuntimeError)         training cannot go on
│   └── NonFiniteError                   loss or gradients were NaN or Inf too many times in a row
├── GenerationError (ValueError)         a prompt or sampling setting that cannot be used
└── MissingExtraError (ImportError)      an optional dependency is not installed; names the pip command
"""

from __future__ import annotations


class MoesysError(Exception):
    """Base of every error that moesys raises on purpose; the command line prints it without a traceback."""


class ConfigError(MoesysError, ValueError):
    """A setting cannot be used."""


class UnknownKeyError(ConfigError):
    """A configuration key does not exist."""


class IneffectiveOptionError(ConfigError):
    """A key was set that has no effect in this configuration."""


class DataError(MoesysError, ValueError):
    """A corpus, tokenizer or document cannot be used."""


class ShapeError(MoesysError, ValueError):
    """Tensors or sizes do not fit together."""


class KernelError(MoesysError, ValueError):
    """A kernel that was chosen by hand cannot take the call."""


class RoutingError(MoesysError, ValueError):
    """Router logits or routing options cannot be used."""


class CheckpointError(MoesysError, RuntimeError):
    """A checkpoint cannot be written or read."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's contents differ from its manifest."""


class DiskSpaceError(CheckpointError, OSError):
    """There is not enough disk space for what was to be written."""


class SectionReadError(MoesysError, OSError):
    """Weights on the disk cannot be read, or are not what they were."""


class ModelFormatError(MoesysError, ValueError):
    """A model folder or layout cannot be read or written."""


class TrainingError(MoesysError, RuntimeError):
    """Training cannot go on."""


class NonFiniteError(TrainingError):
    """Loss or gradients were NaN or Inf too many times in a row."""


class GenerationError(MoesysError, ValueError):
    """A prompt or a sampling setting cannot be used."""


class MissingExtraError(MoesysError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed; pip install 'moesys[{extra}]'"
        )
