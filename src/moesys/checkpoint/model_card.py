"""The README of an exported model, written from what is known about its run: data, shape, curves, checksums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesys.checkpoint.files import WrittenFile
from moesys.models import DecoderConfig


@dataclass(frozen=True)
class CurvePoint:
    """A point of the training curve. ``bits_per_byte`` is of the training text, ``heldout`` of held-out text."""

    step: int
    tokens: int
    bits_per_byte: float | None
    heldout_bits_per_byte: float | None


@dataclass(frozen=True)
class ModelCard:
    """What the card says."""

    name: str
    architecture: str
    config: DecoderConfig
    num_parameters: int
    data_source: str
    curve: Sequence[CurvePoint]
    config_toml: str
    environment: Mapping[str, object]
    files: Mapping[str, WrittenFile]

    def render(self) -> str:
        """Returns the card as Markdown with the metadata block that model hubs read."""
        c = self.config
        facts = {
            "Parameters": f"{self.num_parameters:,} ({c.num_matmul_parameters_per_token:,} multiply each token)",
            "Layers": f"{c.num_layers}, of which {len(c.moe_layer_ids)} with experts",
            "Hidden size": str(c.hidden_size),
            "Vocabulary": str(c.vocab_size),
            "Context": f"{c.position_limit} tokens",
            "Data": f"`{self.data_source}`",
            "Trained with": f"moesys {self.environment.get('moesys')}, revision {self.environment.get('git_revision')}",
        }
        table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
        files = "\n".join(
            f"| `{name}` | {file.size_bytes:,} | `{file.sha256}` |" for name, file in self.files.items()
        )
        return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [moe, moesys]
---

# {self.name}

A Mixture-of-Experts language model in the layout of `{self.architecture}`. It loads in transformers
(`AutoModelForCausalLM.from_pretrained`) and in moesys (`moesys generate`, `moesys chat`, `moesys eval`).

| | |
|---|---|
{table}

## Training curve

{self._render_curve()}

## Configuration

```toml
{self.config_toml.strip()}
```

## Checksums

| file | bytes | sha256 |
|---|---|---|
{files}
"""

    def _render_curve(self) -> str:
        def text(value: float | None) -> str:
            return "" if value is None else f"{value:.4f}"

        rows = "\n".join(
            f"| {p.step} | {p.tokens:,} | {text(p.bits_per_byte)} | {text(p.heldout_bits_per_byte)} |"
            for p in self.curve
        )
        return f"| step | tokens | training bits/byte | held-out bits/byte |\n|---|---|---|---|\n{rows}"
