"""The tree of exceptions: what callers may catch."""

from __future__ import annotations

import inspect

import pytest

from moesys import errors

STANDARD = {
    "ConfigError": ValueError,
    "UnknownKeyError": ValueError,
    "IneffectiveOptionError": ValueError,
    "DataError": ValueError,
    "ShapeError": ValueError,
    "KernelError": ValueError,
    "RoutingError": ValueError,
    "CheckpointError": RuntimeError,
    "DamagedCheckpointError": RuntimeError,
    "DiskSpaceError": OSError,
    "ModelFormatError": ValueError,
    "SectionReadError": OSError,
    "TrainingError": RuntimeError,
    "NonFiniteError": RuntimeError,
    "GenerationError": ValueError,
    "MissingExtraError": ImportError,
}
CLASSES = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls)}


def test_every_error_is_ours_and_a_standard_one() -> None:
    assert set(CLASSES) == {"MoesysError", *STANDARD}
    for name, standard in STANDARD.items():
        assert issubclass(CLASSES[name], errors.MoesysError)
        assert issubclass(CLASSES[name], standard)


def test_the_drawn_tree_is_the_real_one() -> None:
    assert errors.__doc__
    for name in CLASSES:
        assert f"{name} " in errors.__doc__ or f"{name}\n" in errors.__doc__


@pytest.mark.parametrize(
    ("child", "parent"),
    [
        ("UnknownKeyError", "ConfigError"),
        ("IneffectiveOptionError", "ConfigError"),
        ("DamagedCheckpointError", "CheckpointError"),
        ("DiskSpaceError", "CheckpointError"),
        ("NonFiniteError", "TrainingError"),
    ],
)
def test_children(child: str, parent: str) -> None:
    assert issubclass(CLASSES[child], CLASSES[parent])


def test_missing_extra_names_package_and_command() -> None:
    message = str(errors.MissingExtraError("pyarrow", "data", "reading Parquet"))
    assert message == (
        "reading Parquet needs the package 'pyarrow', which is not installed; pip install 'moesys[data]'"
    )


def test_messages_survive() -> None:
    assert str(errors.DiskSpaceError("need 3 GiB, have 1 GiB")) == "need 3 GiB, have 1 GiB"
