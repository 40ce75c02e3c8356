"""The commands one after the other, as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_calls import SETTINGS, Call

from moesys.training import Trainer
from moesys.training.metrics import read_metrics
from moesys.training.step import StepResult


def test_training_says_what_it_does_and_what_comes_next(train: Call, corpus: Path, tmp_path: Path) -> None:
    answer = train()
    assert answer.status == 0
    assert answer.err == ""
    lines = answer.out.splitlines()
    assert lines[0].startswith(f"{corpus}: 5 documents")
    assert "experts 4 top-2" in lines[1]
    assert lines[2].startswith("4 steps of 32 tokens, fp32, cpu, 1 threads; run in ")
    assert [line.split(" |")[0] for line in lines if " | loss " in line] == ["step 2/4", "step 4/4"]
    assert lines[-1] == f"done; next: moesys export {tmp_path / 'run'} --to {tmp_path / 'run' / 'export'}"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.toml", "environment.json", "metrics.jsonl", "tokenizer", "checkpoints"
    }  # fmt: skip


def test_the_run_folder_has_a_default_name(
    moesys_command: Call, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert moesys_command("train", *SETTINGS, f'data.source="{corpus}"').status == 0
    [folder] = (tmp_path / "runs").iterdir()
    assert (folder / "config.toml").exists()


def test_a_finished_run_resumes_to_its_end(moesys_command: Call, run: Path) -> None:
    answer = moesys_command("resume", run)
    assert answer.status == 0
    assert "resumed at step 4" in answer.out
    assert "this run was finished before: held out" in answer.out
    metrics = read_metrics(run / "metrics.jsonl")
    assert (len(metrics.train), len(metrics.evaluations)) == (2, 1)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_is_the_status(
    train: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    take_step = Trainer.take_step

    def interrupt(trainer: Trainer) -> StepResult:
        os.kill(os.getpid(), number)
        return take_step(trainer)

    monkeypatch.setattr(Trainer, "take_step", interrupt)
    answer = train()
    assert answer.status == status
    assert f"step-00000001; go on with: moesys resume {tmp_path / 'run'}" in answer.out


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    train: Call, moesys_command: Call, tmp_path: Path
) -> None:
    assert train("training.checkpoint_every=2", "training.keep_checkpoints=3").status == 0
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    for file in newest.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    answer = moesys_command("resume", tmp_path / "run")
    assert answer.status == 0
    assert "WARNING" in answer.out
    assert str(newest) in answer.out
    assert "resumed at step 2" in answer.out
    assert "done; next: moesys export" in answer.out


def test_exporting_says_what_was_written(run: Path, moesys_command: Call, tmp_path: Path) -> None:
    answer = moesys_command("export", run, "--to", tmp_path / "model", "--dtype", "bf16")
    assert answer.status == 0
    assert answer.out.startswith(f"wrote qwen3_moe layout to {tmp_path / 'model'}: step 4, ")
    assert f"next: moesys generate {tmp_path / 'model'} -p" in answer.out
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_generating_continues_the_prompt_and_equal_seeds_agree(model: Path, moesys_command: Call) -> None:
    answers = [
        moesys_command("generate", model, "-p", "line 1", "-n", "6", "--seed", seed) for seed in (3, 3, 4)
    ]
    assert all(answer.status == 0 for answer in answers)
    assert all(answer.out.startswith("line 1") for answer in answers)
    assert answers[0].out == answers[1].out != answers[2].out
    assert "prompt tokens in" in answers[0].err


def test_evaluating_prints_text_or_json(model: Path, corpus: Path, moesys_command: Call) -> None:
    text = moesys_command("eval", model, "--data", corpus)
    parsed = json.loads(moesys_command("eval", model, "--data", corpus, "--json").out)
    assert parsed.keys() == {"loss", "bits_per_byte", "num_targets", "num_bytes"}
    assert parsed["num_bytes"] == sum(path.stat().st_size for path in corpus.iterdir())
    assert text.out.startswith(
        f"{parsed['bits_per_byte']:.4f} bits/byte, loss {parsed['loss']:.4f} nats/token"
    )


def test_evaluating_the_heldout_part_is_what_training_said(
    model: Path, run: Path, corpus: Path, moesys_command: Call
) -> None:
    options = ["--data", corpus, "--heldout-fraction", "0.2", "--json"]
    parsed = json.loads(moesys_command("eval", model, *options).out)
    [evaluation] = read_metrics(run / "metrics.jsonl").evaluations
    assert parsed["bits_per_byte"] == evaluation.heldout_bits_per_byte


def test_evaluating_records_takes_their_field(model: Path, tmp_path: Path, moesys_command: Call) -> None:
    lines = [json.dumps({"body": f"line {i} of a file"}) for i in range(4)]
    (tmp_path / "records.data").write_text("\n".join(lines))
    options = ["--data", tmp_path / "records.data", "--format", "jsonl", "--text-field", "body", "--json"]
    answer = moesys_command("eval", model, *options)
    assert answer.status == 0, answer.err
    assert json.loads(answer.out)["num_bytes"] == 4 * len("line 0 of a file")


def test_every_stop_token_of_the_folder_ends_a_text(model: Path, moesys_command: Call) -> None:
    file = model / "generation_config.json"
    keys = json.loads(file.read_text())
    file.write_text(json.dumps({**keys, "eos_token_id": list(range(300))}))
    answer = moesys_command("generate", model, "-p", "line 1", "-n", "6")
    assert answer.out == "line 1\n"
    assert "1 new tokens" in answer.err
    assert "ended by end of text" in answer.err


def test_chatting_answers_until_an_empty_line(
    train: Call, moesys_command: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("data.sequence_length=64").status == 0
    assert moesys_command("export", tmp_path / "run", "--to", tmp_path / "model").status == 0
    lines = iter(["hi", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    answer = moesys_command("chat", tmp_path / "model", "-n", "3")
    assert answer.status == 0
    assert "no chat template" in answer.err
    assert "new tokens at" in answer.err
    assert next(lines, "all read") == "all read"


@pytest.mark.slow
def test_the_default_corpus_trains_in_a_process_of_its_own(tmp_path: Path) -> None:
    settings = [s for s in SETTINGS if not s.startswith("data.heldout")]
    done = subprocess.run(
        [sys.executable, "-m", "moesys", "train", *settings, "--run", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("stdlib: ")
