"""Arguments that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moesys.config import Config
    from moesys.inference import SamplingParams
    from moesys.kernels import Int8Product

ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="A TOML file and dotted overrides, such as model.num_experts=64.",
        show_default=False,
    ),
]


def find_model(name: str) -> Path:
    """Returns the folder of a model that a user names; says on stderr which commit a name on the hub stands for."""
    from moesys.checkpoint import resolve_model

    source = resolve_model(name)
    if source.repository is not None:
        print(f"using {source.name}", file=sys.stderr)
    return source.folder


def _find_argument(context: typer.Context, name: str) -> Path | None:
    return None if context.resilient_parsing else find_model(name)


ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A model folder in Hugging Face layout, a packed file, or org/model[@revision] on the hub.",
        parser=str,
        callback=_find_argument,
    ),
]
FolderArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A model folder in Hugging Face layout, or org/model[@revision] on the hub.",
        parser=str,
        callback=_find_argument,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "-n",
        help="Tokens to write at most.",
        show_default="128, or what the model's context leaves",
    ),
]
Temperature = Annotated[float, typer.Option(help="Randomness; 0 always takes the most probable token.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k most probable tokens.", show_default="all")]
TopP = Annotated[float, typer.Option(help="Draw from the most probable tokens that reach this probability.")]
MinP = Annotated[float, typer.Option(help="Draw from tokens with this share of the largest probability.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: make tokens seen before less likely.")]
Seed = Annotated[int | None, typer.Option(help="Equal seeds write equal text.", show_default="0")]
StopStrings = Annotated[
    list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")
]
Dtype = Annotated[str | None, typer.Option(help="fp32 or bf16.", show_default="as stored")]
PRODUCT_HELP = "w8 or w8a8, which rounds activations too: how int8 weights are multiplied."


def read_config(arguments: list[str] | None) -> Config:
    """Builds the config from at most one file name and any number of KEY=VALUE."""
    from moesys.config import load_config
    from moesys.errors import ConfigError

    files = [argument for argument in arguments or [] if "=" not in argument]
    if len(files) > 1:
        raise ConfigError(
            f"give one config file, got {len(files)}: {', '.join(files)}; overrides look like key=value"
        )
    overrides = [argument for argument in arguments or [] if "=" in argument]
    return load_config(Path(files[0]) if files else None, overrides)


def make_sampling(
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
) -> SamplingParams:
    """Collects the sampling options, None where not given; raises `GenerationError` for one out of range and
    `IneffectiveOptionError` for a seed without effect."""
    from moesys.errors import IneffectiveOptionError
    from moesys.inference import SamplingParams

    if seed is not None and temperature == 0:
        raise IneffectiveOptionError(
            "--seed has no effect at temperature 0, which takes the most probable token; "
            "raise the temperature or drop it"
        )
    return SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed or 0)


def parse_product(name: str | None) -> Int8Product | None:
    """Returns how int8 weights are multiplied; None where nothing was said. Raises `ConfigError` for another name."""
    from moesys.errors import ConfigError
    from moesys.kernels import Int8Product

    if name is not None and name not in list(Int8Product):
        raise ConfigError(f"--product ({name!r}) must be {' or '.join(Int8Product)}")
    return None if name is None else Int8Product(name)
