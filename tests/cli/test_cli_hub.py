"""Commands that take a model: names on the hub, and a model's own chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from command_calls import SETTINGS, Call
from huggingface_hub import errors

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name for which the hub has the small model."""
    folder = model.rename(model.with_name(COMMIT))

    def download(repository: str, **options: object) -> str:
        if repository != "org/model":
            raise errors.LocalEntryNotFoundError("nothing here")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return "org/model"


def test_every_command_takes_a_name_on_the_hub_and_names_the_commit(
    moesys_command: Call, hub: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    for arguments in (
        ("generate", hub, "-p", "line", "-n", "2"),
        ("eval", f"{hub}@main", "--data", corpus),
        ("chat", hub),
        ("inspect", hub),
        ("export", hub, "--to", tmp_path / "again"),
    ):
        answer = moesys_command(*arguments)
        assert answer.status == 0, answer.err
        assert f"using org/model@{COMMIT}" in answer.error
    refused = moesys_command("generate", "org/other")
    assert refused.status == 1
    assert refused.error.startswith("error: org/other is no folder here")
    assert moesys_command("generate", "--help").status == 0


def test_training_starts_from_the_hub_and_records_the_commit(
    moesys_command: Call, hub: str, corpus: Path, tmp_path: Path
) -> None:
    settings = [setting for setting in SETTINGS if not setting.startswith(("model.", "data.vocab"))]
    answer = moesys_command(
        "train", f"model.init={hub}", f'data.source="{corpus}"', *settings, "--run", tmp_path / "tuned"
    )
    assert answer.status == 0, answer.err
    assert f"starting from org/model@{COMMIT}, a qwen3_moe" in answer.out
    assert f'init = "org/model@{COMMIT}"' in (tmp_path / "tuned" / "config.toml").read_text()
    exported = moesys_command("export", tmp_path / "tuned", "--to", tmp_path / "out")
    assert exported.status == 0, exported.err
    assert f"org/model@{COMMIT}" in (tmp_path / "out" / "README.md").read_text()


def test_chat_takes_one_of_several_templates(
    moesys_command: Call, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = [
        {"name": name, "template": f"{{{{ messages[0].content }}}} {name}"} for name in ("plain", "rag")
    ]
    keys = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(keys | {"chat_template": templates}))
    answer = moesys_command("chat", model)
    assert "has no chat template 'default'; choose one of: plain, rag" in answer.error
    lines = iter(["hi", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    answer = moesys_command("chat", model, "--template", "rag", "-n", "2", "--temperature", "0")
    assert answer.status == 0, answer.err
    assert "transcript" not in answer.err
