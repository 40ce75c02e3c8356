"""What ``import moesys`` costs and offers, and what no file of it may call."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moesys

PACKAGE = Path(moesys.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def run_fresh(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("moesys", ["torch", "numpy", "pydantic", "typer", "rich", "transformers"]),
        ("moesys.errors, moesys.units, moesys.env", ["torch", "numpy", "pydantic"]),
        ("moesys.config", ["torch", "numpy", "transformers"]),
        ("moesys.models", ["pydantic", "typer", "rich", "transformers", "tokenizers"]),
    ],
)
def test_imports_in_a_fresh_interpreter(module: str, absent: list[str]) -> None:
    assert run_fresh(f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])") == "[]"


def test_every_public_name_resolves() -> None:
    assert len(set(moesys.__all__)) == len(moesys.__all__)
    for name in moesys.__all__:
        assert getattr(moesys, name) is not None


def test_public_names_are_frozen() -> None:
    assert sorted(moesys.__all__) == ["Engine", "MoEConfig", "MoELayer", "MoesysError", "__version__", "load"]


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'moesys' has no attribute 'Motor'"):
        _ = moesys.Motor  # type: ignore[attr-defined]


def test_the_version_is_the_installed_packages() -> None:
    assert moesys.__version__ == importlib.metadata.version("moesys")


def test_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


BANNED_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BANNED_NAMES = {"eval", "exec", "__import__"}
BANNED_CALLS = {
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "numpy.memmap.dump",
    "yaml.load",
    "yaml.unsafe_load",
    "jinja2.Environment",
}
BANNED_METHODS = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    "read_pickle",
    "to_pickle",
}


def find_breaches(source: str) -> Iterator[str]:
    """Yields what in a module breaks law 10: unpickling, evaluating, code from a file or from a wire."""
    tree = ast.parse(source)
    homes: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    root = alias.name.split(".")[0]
                    homes[alias.asname or root] = alias.name if alias.asname else root
                    if root in BANNED_MODULES:
                        yield f"import {alias.name}"
            case ast.ImportFrom(module=str(module), names=names):
                homes |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in names}
                if module.split(".")[0] in BANNED_MODULES:
                    yield f"from {module} import"
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) if name in BANNED_NAMES:
                yield name
            case ast.Attribute(attr=name) | ast.alias(name=name) if name in BANNED_METHODS:
                yield name
            case ast.keyword(arg="allow_pickle" | "trust_remote_code" as name, value=value) if not (
                isinstance(value, ast.Constant) and value.value is False
            ):
                yield f"{name}="
            case ast.Name() | ast.Attribute() if (dotted := _resolve(node, homes)) in BANNED_CALLS:
                yield dotted


def _resolve(node: ast.expr, homes: dict[str, str]) -> str:
    match node:
        case ast.Name(id=name):
            return homes.get(name, name)
        case ast.Attribute(value=value, attr=attr):
            return f"{_resolve(value, homes)}.{attr}"
        case _:
            return ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_law_10_no_pickle_no_eval(path: Path) -> None:
    assert list(find_breaches(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import marshal",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.save(1, 'x')",
        "from torch import load as read\nread('x')",
        "eval('1')",
        "f = exec",
        "import torch.distributed as dist\ndist.broadcast_object_list([])",
        "from torch.distributed import all_gather_object",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=flag)",
        "from jinja2 import Environment\nEnvironment()",
    ],
)
def test_law_10_check_finds_breaches(source: str) -> None:
    assert list(find_breaches(source))


def test_law_10_check_spares_the_rest() -> None:
    harmless = (
        "import torch\nmodel.eval()\ntorch.nn.Module.load\nnp.load('x', allow_pickle=False)\nre.exec_module\n"
    )
    assert list(find_breaches(harmless)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_opens_with_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
