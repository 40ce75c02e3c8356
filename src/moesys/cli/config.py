"""``moesys config``."""

from __future__ import annotations

import json
import sys

import typer

from moesys.cli.arguments import ConfigArguments, read_config

config_app = typer.Typer(
    help="Show a resolved configuration, or the schema of all keys.", no_args_is_help=True
)


@config_app.command()
def show(arguments: ConfigArguments = None) -> None:
    """Print the resolved configuration as TOML.

    Example: `moesys config show examples/tiny.toml training.steps=50`
    """
    from moesys.config import dump_toml

    sys.stdout.write(dump_toml(read_config(arguments)))


@config_app.command()
def schema() -> None:
    """Print the JSON schema: every key with its type, default and meaning.

    Example: `moesys config schema`
    """
    from moesys.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2, ensure_ascii=False))
