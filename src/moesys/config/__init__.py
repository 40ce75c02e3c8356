"""The one validated schema behind the command line, Python and saved runs. Importable without torch."""

from moesys.config.effects import check_effects
from moesys.config.load import build_config, dump_toml, load_config, parse_overrides
from moesys.config.schema import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    RuntimeConfig,
    TrainingConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "MemoryConfig",
    "ModelConfig",
    "RuntimeConfig",
    "TrainingConfig",
    "build_config",
    "check_effects",
    "dump_toml",
    "load_config",
    "parse_overrides",
]
