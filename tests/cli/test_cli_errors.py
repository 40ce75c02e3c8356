"""Bad input gives one message with cause and fix, a non-zero status, and a traceback only with --debug."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from command_calls import SETTINGS, Answer, Call

from moesys.env import read_debug


def assert_explained(answer: Answer, message: str) -> None:
    assert answer.status == 1
    assert answer.err.startswith("error: ")
    assert answer.err.count("error: ") == 1
    assert re.search(message, answer.error), answer.err
    assert "Traceback" not in answer.err
    assert "unexpected" not in answer.err


TRAIN_MISTAKES = {
    "missing corpus": (
        'data.source="nowhere"',
        r"nowhere: there is no such file or folder .*set data.source to",
    ),
    "k > experts": (
        "model.top_k=5",
        r"top_k \(5\) must not exceed num_experts \(4\); set model.top_k to at most 4",
    ),
    "hidden not divisible by heads": (
        "model.num_heads=3",
        r"hidden_size \(16\) must be divisible by num_heads \(3\); try num_heads = 1, 2, 4, 8",
    ),
    "unknown key": (
        "model.num_expert=4",
        r"unknown key 'model.num_expert'; did you mean 'model.num_experts'",
    ),
    "option without effect": (
        "training.decay_fraction=0.1",
        r"training.decay_fraction has no effect: it belongs to training.schedule=wsd",
    ),
    "fp16": ("training.dtype=fp16", r"dtype fp16 is refused: .*use bf16"),
    "too little text": (
        "data.sequence_length=50000",
        r"too small: .*sequence_length 50000 .*set data.sequence_length",
    ),
    "a device that is none": ("runtime.device=gpu", r"runtime.device \('gpu'\) is not a device; use cpu"),
    "a section as a value": ("model=4", r"'model' is a section .*model.KEY=VALUE"),
    "a value of another type": ("model.top_k=two", r"model.top_k: .*integer.*\(got 'two'\)"),
}


@pytest.mark.parametrize(("setting", "message"), TRAIN_MISTAKES.values(), ids=TRAIN_MISTAKES.keys())
def test_a_mistake_in_the_settings(setting: str, message: str, train: Call, tmp_path: Path) -> None:
    assert_explained(train(setting), message)
    assert not (tmp_path / "run").exists()
    debugged = train(setting, debug=True)
    assert debugged.status == 1
    assert debugged.err.startswith("Traceback (most recent call last):")
    assert re.search(message, debugged.error)


def test_the_environment_variable_is_the_flags_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in {"1": True, "0": False, "": False}.items():
        monkeypatch.setenv("MOESYS_DEBUG", value)
        assert read_debug() is expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_can_be_corrected_with_the_same_folder(train: Call, tmp_path: Path) -> None:
    assert_explained(train("runtime.device=cuda"), r"'cuda', but torch .* sees no GPU here; use cpu")
    assert not (tmp_path / "run").exists()
    assert train("runtime.device=cpu").status == 0


def test_an_empty_corpus(train: Call, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_explained(train(f'data.source="{tmp_path / "empty"}"'), r"empty.*(no|empty).*")
    (tmp_path / "empty.txt").write_text("")
    assert_explained(train(f'data.source="{tmp_path / "empty.txt"}"'), r"empty.txt")


def test_a_binary_file(train: Call, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_bytes(b"text\0\x01\x02")
    assert_explained(
        train(f'data.source="{tmp_path / "data.txt"}"'),
        r"data.txt: byte 4 is a zero byte.*text must be UTF-8: convert",
    )


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(train: Call, corpus: Path) -> None:
    (corpus / "0.txt").chmod(0)
    assert_explained(train(), r"0.txt: cannot be read \(Permission denied\); make it readable")


def test_a_loss_that_explodes(train: Call) -> None:
    answer = train("training.learning_rate=1e30", "training.steps=20", "training.max_skipped_steps=2")
    assert_explained(
        answer,
        r"NaN or Inf in 2 steps in a row .*it began in (layer 0, |the ).*lower training.learning_rate \(1e\+30\)",
    )
    assert answer.out.count("WARNING: step ") == 2


def test_a_folder_that_holds_a_run(train: Call, run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert_explained(train(), r"already holds a run; go on with it \(moesys resume .*\(--run\)")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_resuming_what_is_no_run(moesys_command: Call, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        answer = moesys_command("resume", folder)
        assert_explained(
            answer, r"holds no run \(no config.toml\); give the folder that `moesys train` printed"
        )


def test_resuming_on_a_changed_corpus(moesys_command: Call, run: Path, corpus: Path) -> None:
    (corpus / "0.txt").write_text("another text\n" * 40)
    assert_explained(moesys_command("resume", run), r"has changed since the checkpoint .*restore the files")


def test_resuming_another_config(moesys_command: Call, run: Path) -> None:
    file = run / "config.toml"
    file.write_text(file.read_text().replace("num_experts = 4", "num_experts = 8"))
    answer = moesys_command("resume", run)
    assert_explained(answer, r"another config: model.num_experts: checkpoint 4, now 8 restore these lines")


def test_exporting_into_a_folder_with_something_in_it(moesys_command: Call, run: Path) -> None:
    answer = moesys_command("export", run, "--to", run)
    assert_explained(answer, r"exists and is not an empty folder; give another one with --to")


def test_exporting_as_what_does_not_exist(moesys_command: Call, run: Path, tmp_path: Path) -> None:
    answer = moesys_command("export", run, "--to", tmp_path / "model", "--dtype", "int4")
    assert_explained(answer, r"dtype 'int4' is not known; use fp32 or bf16")
    answer = moesys_command("export", run, "--to", tmp_path / "model", "--dtype", "fp16")
    assert_explained(answer, r"fp16 is refused: .*use bf16")


def test_exporting_a_shape_that_no_layout_holds(train: Call, moesys_command: Call, tmp_path: Path) -> None:
    assert train("model.shared_expert_intermediate_size=8").status == 0
    answer = moesys_command("export", tmp_path / "run", "--to", tmp_path / "model")
    assert_explained(
        answer, r"no Hugging Face layout holds this model; .*qwen3_moe: shared_\w+ \(model.shared_expert"
    )
    assert not (tmp_path / "model").exists()


def test_generating_from_a_run(moesys_command: Call, run: Path) -> None:
    answer = moesys_command("generate", run, "-p", "x")
    assert_explained(answer, r"is a training run; export it first: moesys export")


def test_generating_with_filters_at_temperature_zero(moesys_command: Call, model: Path) -> None:
    answer = moesys_command("generate", model, "-p", "x", "--temperature", "0", "--top-k", "5")
    assert_explained(answer, r"no effect at temperature 0, .*; raise the temperature or drop them")
    assert answer.out == ""


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_seed_at_temperature_zero(moesys_command: Call, model: Path, command: str) -> None:
    answer = moesys_command(command, model, "--temperature", "0", "--seed", "0")
    assert_explained(answer, r"--seed has no effect at temperature 0, .*; raise the temperature or drop it")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heldout-fraction", "1.5"], r"data.heldout_fraction: Input should be less than 1 \(got 1.5\)"),
        (["--heldout-fraction", "0"], r"data.heldout_fraction: Input should be greater than 0 \(got 0.0\)"),
        (["--format", "text"], r"data.format has no effect: data.source is not a file or folder"),
        (["--text-field", "body"], r"data.text_field has no effect: plain text has no fields"),
        (
            ["--data", "x", "--format", "word"],
            r"data.format: Input should be 'auto', 'text', 'jsonl', 'parquet' or 'chat'",
        ),
    ],
)
def test_evaluation_options_that_cannot_be_used(
    moesys_command: Call, model: Path, options: list[str], message: str
) -> None:
    assert_explained(moesys_command("eval", model, *options), message)


def test_a_cache_that_cannot_be_written(train: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("MOESYS_CACHE", str(tmp_path / "cache"))
    assert_explained(train(), r"the cache entry .* cannot be written \(.*set MOESYS_CACHE to a folder")


def test_a_prompt_that_is_too_long(moesys_command: Call, model: Path) -> None:
    answer = moesys_command("generate", model, "-p", "many words " * 30, "-n", "4")
    assert_explained(answer, r"needs \d+ positions, the model was made for 1 to 16; shorten the prompt")


def test_two_config_files(moesys_command: Call, tmp_path: Path) -> None:
    answer = moesys_command("train", "a.toml", "b.toml", "--run", tmp_path / "run")
    assert_explained(answer, r"give one config file, got 2: a.toml, b.toml; overrides look like key=value")


def test_a_config_file_that_is_no_toml_or_not_there(moesys_command: Call, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[model\nhidden_size = 16")
    for command in (("train",), ("config", "show")):
        answer = moesys_command(*command, tmp_path / "bad.toml")
        assert_explained(answer, r"bad.toml is not a TOML file: .*line 1")
        answer = moesys_command(*command, tmp_path / "none.toml")
        assert_explained(answer, r"none.toml does not exist; give a TOML file, or dotted overrides alone")


def test_evaluating_less_than_one_token(moesys_command: Call, model: Path) -> None:
    answer = moesys_command("eval", model, "--max-tokens", "0")
    assert answer.status == 2
    assert "--max-tokens" in answer.error
    assert "1" in answer.error


def test_a_defect_asks_for_a_report(train: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("moesys.training.trainer.prepare_data", fail)
    answer = train()
    assert answer.status == 1
    assert answer.err.startswith(
        "error: unexpected ZeroDivisionError: division by zero\nthis is a defect of moesys"
    )
    assert "Traceback" not in answer.err


def test_ctrl_c_before_training_exits_with_130(train: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moesys.training.trainer.prepare_data", interrupt)
    answer = train()
    assert answer.status == 130
    assert "Traceback" not in answer.err


def test_the_small_settings_are_fine(moesys_command: Call) -> None:
    assert moesys_command("config", "show", *SETTINGS).status == 0
