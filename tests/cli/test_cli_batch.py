"""``generate --batch``: results of a file of prompts, and what is refused before weights are read."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_calls import Answer, Call

from moesys.inference import batch as batches

LINES: list[dict[str, Any]] = [
    {"prompt": "line 1"},
    {"prompt": "line 1"},
    {"prompt": "file 3", "id": "x", "max_new_tokens": 2},
    {"prompt": ""},
    {"prompt": "apples"},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path, LINES)


def write_prompts(folder: Path, lines: list[dict[str, Any]]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_sorted(path: Path) -> list[dict[str, Any]]:
    """Results in the order of their prompts."""
    return sorted(read(path), key=lambda result: result["line"])


def stop_after(monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    """Makes a batch end with Ctrl-C."""
    take_step, left = batches.BatchRun._step, num_steps

    def stop(self: batches.BatchRun) -> list[batches.BatchResult]:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return take_step(self)

    monkeypatch.setattr(batches.BatchRun, "_step", stop)


def refuse_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes reading weights a failure."""

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were opened")

    monkeypatch.setattr("moesys.cli.opening.open_model", fail)


def test_results_do_not_depend_on_the_number_of_texts_at_once(
    model: Path, prompts: Path, tmp_path: Path, moesys_command: Call
) -> None:
    outputs = {}
    budget = ("--host-memory", "500MiB")
    for name, more in (
        ("one", ("--batch-size", "1")),
        ("all", ()),
        ("capped", budget),
        ("capped to three", (*budget, "--batch-size", "3")),
        ("capped to one", (*budget, "--batch-size", "1")),
    ):
        output = tmp_path / f"{name}.jsonl"
        answer = moesys_command("generate", model, "--batch", prompts, "--output", output, "-n", "5", *more)
        assert answer.status == 0, answer.err
        assert answer.out == ""
        assert f"5 results in {output}:" in answer.err
        assert ("expert uses found in memory" in answer.err) == name.startswith("capped")
        assert ("tokens of 5 texts at once" in answer.error) == (name == "capped")
        assert ("tokens of 3 texts at once" in answer.error) == (name == "capped to three")
        outputs[name] = read_sorted(output)
    assert all(results == outputs["one"] for results in outputs.values())
    results = outputs["all"]
    assert [(r["line"], r["prompt"], r.get("id")) for r in results] == [
        (n, line["prompt"], line.get("id")) for n, line in enumerate(LINES, start=1)
    ]
    assert [r["new_tokens"] for r in results][2] <= 2
    assert results[0]["text"] != results[1]["text"]


def test_greedy_results_are_those_of_generate(
    model: Path, prompts: Path, tmp_path: Path, moesys_command: Call
) -> None:
    settings = ("-n", "5", "--temperature", "0")
    output = tmp_path / "out.jsonl"
    assert moesys_command("generate", model, "--batch", prompts, "--output", output, *settings).status == 0
    alone = moesys_command("generate", model, "-p", "apples", *settings)
    assert alone.out == f"apples{read_sorted(output)[4]['text']}\n"


def test_a_run_that_was_stopped_is_gone_on_with(
    model: Path, prompts: Path, tmp_path: Path, moesys_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(output: str) -> Answer:
        return moesys_command(
            "generate",
            model,
            "--batch",
            prompts,
            "--output",
            tmp_path / output,
            "-n",
            "5",
            "--batch-size",
            "2",
        )

    assert run("whole.jsonl").status == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        stopped = run("out.jsonl")
    begun = read(tmp_path / "out.jsonl")
    assert stopped.status == 130
    assert 1 <= len(begun) < 5
    assert f"{len(begun)} results in {tmp_path / 'out.jsonl'}: " in stopped.err
    assert f"; {5 - len(begun)} are left: the same command does them" in stopped.err
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"line": ')
    answer = run("out.jsonl")
    assert answer.status == 0, answer.err
    assert f"{5 - len(begun)} results in" in answer.err
    assert read_sorted(tmp_path / "out.jsonl") == read_sorted(tmp_path / "whole.jsonl")


def test_a_long_text_does_not_hold_up_the_results_of_short_ones(
    model: Path, tmp_path: Path, moesys_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"prompt": "a", "max_new_tokens": 12}, *({"prompt": "b", "max_new_tokens": 1} for _ in range(4))]
    output = tmp_path / "out.jsonl"
    command = ("generate", model, "--batch", write_prompts(tmp_path, lines), "--output", output)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert moesys_command(*command, "--batch-size", "2", "--temperature", "0").status == 130
    assert {2, 3, 4, 5} <= {result["line"] for result in read(output)}
    assert moesys_command(*command, "--temperature", "0").status == 0
    assert [result["line"] for result in read_sorted(output)] == [1, 2, 3, 4, 5]


def test_results_of_another_arithmetic_are_not_mixed_with(
    model: Path, prompts: Path, tmp_path: Path, moesys_command: Call
) -> None:
    int8 = tmp_path / "int8.packed"
    assert moesys_command("pack", model, "--to", int8, "--dtype", "int8").status == 0
    command = ("generate", int8, "--batch", prompts, "--output", tmp_path / "out.jsonl", "-n", "2")
    assert moesys_command(*command).status == 0
    assert "already" in moesys_command(*command, "--product", "w8").err
    other = moesys_command(*command, "--product", "w8a8")
    assert other.status == 1
    assert 'written under other settings: product was "w8" and is "w8a8"' in other.error


def test_nothing_is_loaded_when_nothing_is_left(
    model: Path, prompts: Path, tmp_path: Path, moesys_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("generate", model, "--batch", prompts, "--output", tmp_path / "out.jsonl", "-n", "2")
    assert moesys_command(*command).status == 0
    before = (tmp_path / "out.jsonl").read_text()
    refuse_weights(monkeypatch)
    answer = moesys_command(*command)
    assert answer.status == 0
    assert f"all 5 results are in {tmp_path / 'out.jsonl'} already" in answer.err
    assert (tmp_path / "out.jsonl").read_text() == before
    assert (
        "written under other settings: max_new_tokens was 2 and is 3"
        in moesys_command(*command, "-n", "3").error
    )


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([{"prompt": "a"}, {"text": "b"}, {"prompt": 5}], [], "line 2: unknown key 'text'"),
        ([{"prompt": "a"}, {"text": "b"}, {"prompt": 5}], [], "line 3: prompt must be text, is a number"),
        ([{"prompt": "a"}, {"prompt": "many words " * 30}], [], "line 2: the sequence needs"),
        ([{"prompt": "a", "max_new_tokens": 16}], [], "line 1: the sequence needs 18 positions"),
        ([], [], "holds no prompts"),
        (LINES, ["-n", "0"], "max_new_tokens (0) must be 1 or more"),
        (LINES, ["-p", "x"], "--prompt has no effect with --batch, whose prompts are those of"),
        (LINES, ["-p", ""], "--prompt has no effect with --batch"),
        (LINES, ["--temperature", "0", "--seed", "1"], "--seed has no effect at temperature 0"),
    ],
)
def test_what_cannot_be_done_is_said_before_weights_are_read(
    lines: list[dict[str, Any]],
    options: list[str],
    message: str,
    model: Path,
    tmp_path: Path,
    moesys_command: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_weights(monkeypatch)
    output = tmp_path / "out.jsonl"
    prompts = write_prompts(tmp_path, lines)
    answer = moesys_command("generate", model, "--batch", prompts, "--output", output, *options)
    assert answer.status == 1
    assert message in answer.error
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "prompts.jsonl"], "--batch needs --output FILE"),
        (["--batch", "a", "--output", "a"], "--output must be another file than --batch (a)"),
        (["--batch", "none.jsonl", "--output", "out"], "none.jsonl: No such file or directory"),
        (["--output", "out.jsonl"], "--output has no effect without --batch FILE"),
        (["--batch-size", "4"], "--batch-size has no effect without --batch FILE"),
        (["-n", "0"], "max_new_tokens (0) must be 1 or more"),
        (["-p", "many words " * 30], "the model was made for 1 to 16; shorten the prompt"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_weights_are_read(
    options: list[str], message: str, model: Path, moesys_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_weights(monkeypatch)
    answer = moesys_command("generate", model, *options)
    assert answer.status == 1
    assert message in answer.error


def test_a_chat_keeps_to_its_context(
    model: Path, moesys_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\n"))
    answer = moesys_command("chat", model, "--context", "14", "-n", "3")
    assert "needs" not in answer.err or "the context ends at 14" in answer.error
    refuse_weights(monkeypatch)
    for context in ("17", "1", "0"):
        answer = moesys_command("chat", model, "--context", context)
        assert answer.status == 1
        assert f"context ({context}) must be 2 to 16, which the model was made for" in answer.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-n", "0"], "max_new_tokens (0) must be 1 or more"),
        (["-n", "-5"], "max_new_tokens (-5) must be 1 or more"),
        (["-n", "14", "--context", "14"], "max_new_tokens (14) must be less than the context (14)"),
        (["-n", "16"], "max_new_tokens (16) must be less than the context (16)"),
    ],
)
def test_an_answer_that_leaves_no_message_is_refused_before_weights_are_read(
    options: list[str], message: str, model: Path, moesys_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_weights(monkeypatch)
    answer = moesys_command("chat", model, *options)
    assert answer.status == 1
    assert message in answer.error


def test_a_chat_goes_on_after_a_line_that_is_too_long(
    train: Call, tmp_path: Path, moesys_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("data.sequence_length=64").status == 0
    assert moesys_command("export", tmp_path / "run", "--to", tmp_path / "model").status == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hi\n{'many words ' * 40}\nhi\n\n"))
    usage = tmp_path / "usage.json"
    answer = moesys_command(
        "chat", tmp_path / "model", "-n", "3", "--host-memory", "500MiB", "--usage", usage
    )
    assert answer.status == 0, answer.err
    assert answer.err.count("error: the message needs") == 1
    assert answer.err.count("new tokens at") == 2
    assert usage.exists()
