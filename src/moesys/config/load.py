"""From a TOML file and dotted overrides to a validated `Config`, and back to TOML.

Overrides are ``section.key=value``; the value is read as TOML where it parses as TOML, else as a string.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from moesys.config.effects import check_effects, find_idle_rules
from moesys.config.schema import Config
from moesys.errors import ConfigError, UnknownKeyError


def load_config(path: Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Builds the one validated config from a TOML file (None: defaults) and ``section.key=value`` overrides.

    Raises `UnknownKeyError`, `IneffectiveOptionError` or `ConfigError`, each with the fix.
    """
    tree: dict[str, Any] = {} if path is None else _read_toml(path)
    for dotted, value in parse_overrides(overrides):
        _set_dotted(tree, dotted, value)
    return build_config(tree)


def build_config(tree: Mapping[str, Any]) -> Config:
    """Builds the one validated config from the keys that a user set, by section. Raises like `load_config`."""
    _check_keys(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None
    check_effects(config)
    return config


def parse_overrides(overrides: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of each ``section.key=value``."""
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"an override must look like section.key=value, got {override!r}; "
                              "for example model.num_experts=64")  # fmt: skip
        yield key.strip(), _parse_value(text)


def dump_toml(config: Config) -> str:
    """Returns the resolved config as TOML that `load_config` reads back to an equal one.

    Keys that are None or have no effect in this configuration are left out.
    """
    tree = config.model_dump(mode="json", exclude_none=True)
    for rule in find_idle_rules(config):
        section, leaf = rule.key.split(".")
        tree[section].pop(leaf, None)
    return tomli_w.dumps(tree)


def list_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yields every dotted key of the schema."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from list_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"the config file {path} does not exist; give a TOML file, or dotted overrides alone"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None


def _set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{dotted}: {parent!r} is not a section")
    tree[leaf] = value


def _check_keys(tree: Mapping[str, Any]) -> None:
    known = set(list_keys())
    sections = {key.split(".")[0] for key in known}
    for key in _flatten(tree, sections):
        if key not in known:
            raise UnknownKeyError(_unknown_message(key, known))


def _flatten(tree: Mapping[str, Any], sections: set[str]) -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{key}" for key in value)
        elif name in sections:
            raise ConfigError(
                f"{name!r} is a section and cannot be set to {value!r}; set its keys: {name}.KEY=VALUE"
            )
        else:
            yield name


def _unknown_message(key: str, known: set[str]) -> str:
    leaf = key.rsplit(".", 1)[-1]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in sorted(known)}
    nearest = [by_leaf[leaf]] if leaf in by_leaf else difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not nearest:
        nearest = [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)]
    hint = f"did you mean {nearest[0]!r}?" if nearest else "`moesys config schema` lists all keys"
    return f"unknown key {key!r}; {hint}"


def _describe(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"][:2])
        text = problem["msg"].removeprefix("Value error, ")
        got = f" (got {problem['input']!r})" if problem["type"] != "value_error" else ""
        lines.append(f"{where}: {text}{got}")
    return "\n".join(dict.fromkeys(lines))
