"""The folder of a run: its config, environment, tokenizer, metrics and checkpoints under fixed names."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from moesys.checkpoint import write_text_atomic
from moesys.config import Config, dump_toml, load_config
from moesys.data import Tokenizer
from moesys.errors import CheckpointError, ConfigError
from moesys.training.metrics import METRICS_FILE

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "pydantic")


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def tokenizer_folder(self) -> Path:
        return self.path / "tokenizer"

    @property
    def origin_folder(self) -> Path:
        """Configs of the model that the run started from; missing where it started from nothing."""
        return self.path / "origin"

    @property
    def checkpoints_folder(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard_folder(self) -> Path:
        return self.path / "tensorboard"

    def require_unused(self) -> None:
        """Raises `ConfigError` when the folder holds a run, or what is left of one."""
        if any(path.exists() for path in (self.config_file, self.metrics_file, self.checkpoints_folder)):
            raise ConfigError(
                f"{self.path} already holds a run; go on with it (moesys resume {self.path}), "
                "or choose another folder (--run)"
            )

    def create(
        self,
        config: Config,
        tokenizer: Tokenizer,
        keep_origin: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Makes the folder and writes what describes the run, the config last.

        keep_origin: writes what is kept of the model that the run starts from, where there is one.

        Raises `ConfigError` when a run is there already, and `CheckpointError` where nothing can be written.
        """
        self.require_unused()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tokenizer.save(self.tokenizer_folder)
            keep_origin(self.origin_folder)
        except OSError as error:
            raise CheckpointError(f"cannot create the run folder {self.path}: {error.strerror}") from None
        write_text_atomic(self.environment_file, json.dumps(describe_environment(config), indent=2) + "\n")
        write_text_atomic(self.config_file, dump_toml(config))

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Opens an existing run. Raises `ConfigError` when there is none."""
        run = cls(path)
        if not run.config_file.is_file():
            raise ConfigError(
                f"{path} holds no run (no config.toml); give the folder that `moesys train` printed"
            )
        return run

    def load_config(self) -> Config:
        """Reads the resolved config of the run."""
        return load_config(self.config_file)

    def load_tokenizer(self) -> Tokenizer:
        """Reads the tokenizer that the run was trained with."""
        return Tokenizer.load(self.tokenizer_folder)

    def read_environment(self) -> dict[str, Any]:
        """Reads what `describe_environment` gave when the run began."""
        return json.loads(self.environment_file.read_text(encoding="utf-8"))


def describe_environment(config: Config) -> dict[str, Any]:
    """Returns what a reader needs to reproduce a run: versions, git revision, seeds, hardware, command."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "moesys": importlib.metadata.version("moesys"),
        "git_revision": _read_git_revision(Path(__file__).parent),
        "seeds": {"training": config.training.seed, "data": config.data.seed},
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": _read_cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _read_git_revision(folder: Path) -> str | None:
    """Returns the revision of the checkout that holds ``folder``, with ``-dirty`` for changes; None without git."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _read_cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
