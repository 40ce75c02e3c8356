"""Help answers fast, imports little, and shows an example of every command."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tomllib
from typing import Any

import pytest
import typer
from command_calls import Call

import moesys
from moesys.cli.app import app


def list_commands(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    children = getattr(command, "commands", None)
    if children is None:
        return [path]
    return [found for name, child in children.items() for found in list_commands(child, (*path, name))]


COMMANDS = list_commands(typer.main.get_command(app))


def measure_cpu_s(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "moesys", *arguments]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_commands_are_those_that_work() -> None:
    assert {" ".join(path) for path in COMMANDS} >= {
        "train", "resume", "export", "inspect", "generate", "chat", "eval", "config show", "config schema",
        "doctor", "plan", "verify", "pack", "bench cache",
    }  # fmt: skip


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example_that_names_it(path: tuple[str, ...], moesys_command: Call) -> None:
    answer = moesys_command(*path, "--help")
    assert answer.status == 0
    words = " ".join(answer.out.split())
    assert f"Example: moesys {' '.join(path)} " in words


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help_takes_less_than_a_third_of_a_second(arguments: list[str]) -> None:
    # Others on the machine only ever add to it.
    assert min(measure_cpu_s(*arguments) for _ in range(5)) < 0.3


def list_imported_by(*arguments: str) -> set[str]:
    script = (
        "import sys\n"
        "from moesys.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    return set(done.stderr.split())


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_imports_neither_torch_nor_pydantic(argument: str) -> None:
    modules = list_imported_by(argument)
    assert "moesys.cli.train" in modules
    assert not {"torch", "numpy", "pydantic", "moesys.config"} & modules


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_help_of_a_command_is_as_light_as_typer_lets_it_be(path: tuple[str, ...]) -> None:
    """typer from 0.29 on imports pydantic itself to describe options; the schema and torch stay out."""
    assert not {"torch", "numpy", "moesys.config"} & list_imported_by(*path, "--help")


def test_the_version(moesys_command: Call) -> None:
    answer = moesys_command("--version")
    assert (answer.status, answer.out) == (0, f"{moesys.__version__}\n")


def test_completion_is_printed_for_the_shell() -> None:
    script = "from moesys.cli import main; import sys; sys.argv = ['moesys']; main()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, timeout=60, env={**os.environ, "_MOESYS_COMPLETE": "source_bash"},
    )  # fmt: skip
    assert done.returncode == 0
    assert "complete -o default -F _moesys_completion moesys" in done.stdout


def test_completion_completes_commands() -> None:
    script = "from moesys.cli import main; import sys; sys.argv = ['moesys']; main()"
    variables = {"_MOESYS_COMPLETE": "complete_bash", "COMP_WORDS": "moesys ex", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **variables},
    )
    assert done.stdout.split() == ["export"]


def test_config_show_prints_toml_that_is_the_resolved_config(moesys_command: Call) -> None:
    answer = moesys_command("config", "show", "model.num_experts=64", "training.seed=9")
    tree = tomllib.loads(answer.out)
    assert tree["model"]["num_experts"] == 64
    assert tree["training"]["seed"] == 9
    assert tree["model"]["hidden_size"] == 256


def test_config_schema_explains_every_key(moesys_command: Call) -> None:
    from moesys.config.load import list_keys

    schema = json.loads(moesys_command("config", "schema").out)
    explained = {
        f"{section}.{name}"
        for section, reference in schema["properties"].items()
        for name, field in schema["$defs"][reference["$ref"].rsplit("/", 1)[-1]]["properties"].items()
        if field.get("description")
    }
    assert explained == set(list_keys())


@pytest.mark.parametrize("arguments", ["config schema", "config show", "--help"])
def test_a_reader_that_leaves_early_causes_no_noise(arguments: str) -> None:
    """Short output is written only when the interpreter ends, long output before."""
    script = f"'{sys.executable}' -m moesys {arguments} | exec true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_misuse_exits_with_2_and_says_what(moesys_command: Call) -> None:
    answer = moesys_command("trian")
    assert answer.status == 2
    assert "No such command 'trian'" in answer.error
