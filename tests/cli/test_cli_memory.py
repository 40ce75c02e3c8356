"""``--host-memory``: the same text within a budget, what it says on stderr, and what it refuses."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from command_calls import Call

TEXT = ("-p", "line 1 of file", "-n", "12", "--temperature", "0")


@pytest.fixture
def model(train: Call, moesys_command: Call, tmp_path: Path) -> Path:
    """A model of more positions than the folder's own."""
    for answer in (
        train("data.sequence_length=64"),
        moesys_command("export", tmp_path / "run", "--to", tmp_path / "model"),
    ):
        assert answer.status == 0, answer.err
    return tmp_path / "model"


def test_a_budget_changes_no_text_and_says_what_is_where(model: Path, moesys_command: Call) -> None:
    whole = moesys_command("generate", model, *TEXT)
    for budget, kept in (("500MiB", "4 of 4 experts (100%"), ("90%", r"2 of 4 experts \(")):
        answer = moesys_command("generate", model, *TEXT, "--host-memory", budget)
        assert answer.status == 0, answer.err
        assert answer.out == whole.out
        assert re.search(kept if "\\" in kept else re.escape(kept), answer.error)
        assert re.search(r"KiB of weights resident, .* for keys and values of \d+ tokens, .* for a pass of", answer.error)
        assert re.search(r"% of \d+ expert uses found in memory, .* read from the disk", answer.error)
    assert "resident" not in whole.err


def test_a_chat_within_a_budget(model: Path, moesys_command: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n"))
    answer = moesys_command("chat", model, "-n", "3", "--host-memory", "500MiB")
    assert answer.status == 0, answer.err
    assert "4 of 4 experts" in answer.error
    assert "expert uses found in memory" in answer.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host-memory", "8GB"], "--host-memory ('8GB') must be a size above 0"),
        (["--host-memory", "0%"], "--host-memory ('0%') must be above 0% and at most 100% of the weights"),
        (["--host-memory", "1MiB"], "--host-memory 1.0 MiB is less than resident weights"),
        (["--host-memory", "1GiB", "--dtype", "bf16"], "--dtype bf16 has no effect with --host-memory"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_budgets_that_cannot_be_kept_are_refused(
    command: str, options: list[str], message: str, model: Path, moesys_command: Call
) -> None:
    answer = moesys_command(command, model, *options)
    assert answer.status == 1
    assert message in answer.error
    assert "Traceback" not in answer.err
