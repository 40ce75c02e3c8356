"""``--host-memory``: the same text within a budget, what it says on stderr, and what it refuses."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from command_calls import Call

from moesys.inference import Engine, SequenceStep
from moesys.moe import RoutingLog

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
        assert re.search(r"KiB of weights resident, .* for keys and values of \d+ tokens", answer.error)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cpu-moe"], "--cpu-moe has no effect: it keeps weights off a GPU"),
        (["--n-cpu-moe", "3"], "--n-cpu-moe has no effect: it keeps weights off a GPU"),
        (["--cpu-offload-gb", "2"], "use --host-memory SIZE, within which experts are kept in RAM"),
        (
            ["--host-memory", "1GiB", "--device-memory", "2GiB"],
            "--host-memory 1GiB and --device-memory 2GiB name the same RAM",
        ),
        (["--predict"], "--predict has no effect without --host-memory"),
        (["--no-verify"], "--no-verify has no effect without --host-memory"),
        (["--trace", "t.json"], "--trace has no effect without --host-memory"),
        (["--offload-dir", "packed"], "--offload-dir has no effect without --host-memory"),
        (["--product", "w4"], "--product ('w4') must be w8 or w8a8"),
        (["--product", "w8a8"], "product w8a8 has no effect on the folder"),
    ],
)
def test_options_that_mean_nothing_here_say_what_to_use(
    options: list[str], message: str, model: Path, moesys_command: Call
) -> None:
    answer = moesys_command("generate", model, *TEXT, *options)
    assert answer.status == 1
    assert message in answer.error
    assert not answer.out


def test_what_a_run_within_a_budget_writes(model: Path, moesys_command: Call, tmp_path: Path) -> None:
    names = {"trace": "t.json", "stats": "s.json", "record": "r.safetensors", "usage": "u.json"}
    files = {name: tmp_path / file for name, file in names.items()}
    options = [text for name, file in files.items() for text in (f"--{name}", file)]
    answer = moesys_command("generate", model, *TEXT, "--host-memory", "90%", "--predict", *options)
    assert answer.status == 0, answer.err
    assert answer.out == moesys_command("generate", model, *TEXT).out
    stats = json.loads(files["stats"].read_text())
    assert stats["writing"]["num_tokens"] == 11
    assert 0 < stats["writing"]["policy_share"] <= 1
    assert stats["prompt"]["disk_bytes_per_token"] > 0
    events = json.loads(files["trace"].read_text())
    assert {event["cat"] for event in events if event["ph"] == "X"} >= {"experts", "reading"}
    uses = json.loads(files["usage"].read_text())["counts"]
    log = RoutingLog.read(files["record"])
    assert sum(count for *_, count in uses) == sum(map(len, log.demands()))
    assert (log.num_steps, log.origin) == (12, "model")
    again = moesys_command("generate", model, *TEXT, "--host-memory", "90%", "--usage", files["usage"])
    assert again.out == answer.out
    assert moesys_command("bench", "cache", files["record"]).status == 0


def test_an_offload_folder_holds_one_packed_copy(model: Path, moesys_command: Call, tmp_path: Path) -> None:
    options = ("--host-memory", "90%", "--offload-dir", tmp_path / "packed")
    whole = moesys_command("generate", model, *TEXT)
    first = moesys_command("generate", model, *TEXT, *options)
    (packed,) = (tmp_path / "packed").iterdir()
    written = packed.stat().st_mtime_ns
    assert moesys_command("generate", model, *TEXT, *options).out == first.out == whole.out
    assert [path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()] == [written]
    int8 = tmp_path / "int8.safetensors"
    assert moesys_command("pack", model, "--to", int8, "--dtype", "int8").status == 0
    for product in ("w8", "w8a8"):
        answer = moesys_command("generate", int8, *TEXT, "--host-memory", "90%", "--product", product)
        assert answer.status == 0, answer.err
        assert answer.out == moesys_command("generate", int8, *TEXT, "--product", product).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host-memory", "1GiB", "--product", "w4"], "--product ('w4') must be w8 or w8a8"),
        (["--host-memory", "1GiB", "--product", "w8a8"], "product w8a8 has no effect on the folder {model}"),
        (["--host-memory", "1GiB", "--dtype", "bf16"], "moesys pack {model} --to FILE --dtype bf16"),
        (["--host-memory", "1MiB"], "--host-memory 1.0 MiB is less than resident weights"),
        (["--host-memory", "1 TB"], "--host-memory ('1 TB') must be a size above 0"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_cannot_be_is_refused_before_a_copy_is_packed(
    command: str,
    options: list[str],
    message: str,
    model: Path,
    moesys_command: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("packed")

    monkeypatch.setattr("moesys.inference.packed_copy.pack_model", fail)
    answer = moesys_command(command, model, *options, "--offload-dir", tmp_path / "packed")
    assert answer.status == 1
    assert message.format(model=model) in answer.error
    assert not (tmp_path / "packed").exists()


def test_a_packed_model_takes_no_offload_folder(model: Path, moesys_command: Call, tmp_path: Path) -> None:
    packed = tmp_path / "model.packed"
    assert moesys_command("pack", model, "--to", packed).status == 0
    answer = moesys_command(
        "generate", packed, *TEXT, "--host-memory", "90%", "--offload-dir", tmp_path / "fast"
    )
    assert answer.status == 1
    assert (
        f"--offload-dir {tmp_path / 'fast'} has no effect on {packed}, which is packed already"
        in answer.error
    )


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_ctrl_c_leaves_the_files_of_what_was_computed(
    num_tokens: int, model: Path, moesys_command: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step, left = Engine.step, num_tokens

    def stop(self: Engine, steps: list[SequenceStep]) -> list[torch.Tensor]:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return take_step(self, steps)

    monkeypatch.setattr(Engine, "step", stop)
    names = {"trace": "t.json", "record": "r.safetensors", "usage": "u.json"}
    files = {name: tmp_path / file for name, file in names.items()}
    options = [text for name, file in files.items() for text in (f"--{name}", file)]
    answer = moesys_command("generate", model, *TEXT, "--host-memory", "90%", *options)
    assert answer.status == 130, answer.err
    assert files["usage"].exists()
    assert files["record"].exists() == (num_tokens > 0)
    if num_tokens:
        assert RoutingLog.read(files["record"]).num_steps == num_tokens
        assert json.loads(files["usage"].read_text())["counts"]
    assert isinstance(json.loads(files["trace"].read_text()), list)
